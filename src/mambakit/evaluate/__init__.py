"""Evaluation: how well a model predicts a text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.evaluate.perplexity import Score as Score
    from mambakit.evaluate.perplexity import count_bytes as count_bytes
    from mambakit.evaluate.perplexity import score as score

_NAMES = ("Score", "count_bytes", "score")
__all__ = ["Score", "count_bytes", "score"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module("mambakit.evaluate.perplexity"), name)
    raise AttributeError(f"module 'mambakit.evaluate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
