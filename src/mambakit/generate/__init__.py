"""Continue prompts with a trained model: an engine for many requests, sampling, stopping, streaming."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mambakit.lazy import attach

if TYPE_CHECKING:
    from mambakit.generate.engine import Engine as Engine
    from mambakit.generate.generation import generate as generate
    from mambakit.generate.generation import stream as stream
    from mambakit.generate.options import SamplingOptions as SamplingOptions
    from mambakit.generate.prefix import Prefix as Prefix
    from mambakit.generate.prefix_cache import PrefixCache as PrefixCache
    from mambakit.generate.request import Completion as Completion
    from mambakit.generate.request import Output as Output
    from mambakit.generate.request import Request as Request
    from mambakit.generate.text import generate_text as generate_text
    from mambakit.generate.text import stream_text as stream_text

_EXPORTS = {
    "Completion": "mambakit.generate.request",
    "Engine": "mambakit.generate.engine",
    "Output": "mambakit.generate.request",
    "Prefix": "mambakit.generate.prefix",
    "PrefixCache": "mambakit.generate.prefix_cache",
    "Request": "mambakit.generate.request",
    "SamplingOptions": "mambakit.generate.options",
    "generate": "mambakit.generate.generation",
    "generate_text": "mambakit.generate.text",
    "stream": "mambakit.generate.generation",
    "stream_text": "mambakit.generate.text",
}
__all__ = [
    "Completion",
    "Engine",
    "Output",
    "Prefix",
    "PrefixCache",
    "Request",
    "SamplingOptions",
    "generate",
    "generate_text",
    "stream",
    "stream_text",
]

__getattr__, __dir__ = attach(__name__, _EXPORTS)
