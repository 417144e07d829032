"""Continue prompts with a trained model: sampling, stopping, streaming."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.generate.generation import generate as generate
    from mambakit.generate.generation import stream as stream
    from mambakit.generate.options import SamplingOptions as SamplingOptions
    from mambakit.generate.text import generate_text as generate_text
    from mambakit.generate.text import stream_text as stream_text

_EXPORTS = {
    "SamplingOptions": "mambakit.generate.options",
    "generate": "mambakit.generate.generation",
    "generate_text": "mambakit.generate.text",
    "stream": "mambakit.generate.generation",
    "stream_text": "mambakit.generate.text",
}
__all__ = ["SamplingOptions", "generate", "generate_text", "stream", "stream_text"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'mambakit.generate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
