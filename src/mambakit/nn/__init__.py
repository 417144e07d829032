"""Modules: the Mamba mixer, its block, the norm, and the state they pass along."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.nn.block import Block as Block
    from mambakit.nn.mixer import MambaMixer as MambaMixer
    from mambakit.nn.norm import RMSNorm as RMSNorm
    from mambakit.nn.state import MixerState as MixerState

_EXPORTS = {
    "Block": "mambakit.nn.block",
    "MambaMixer": "mambakit.nn.mixer",
    "MixerState": "mambakit.nn.state",
    "RMSNorm": "mambakit.nn.norm",
}
__all__ = ["Block", "MambaMixer", "MixerState", "RMSNorm"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'mambakit.nn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
