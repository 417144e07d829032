"""Compiled CPU kernels: Numba turns the loops in `kernels/` into vector code at first use and caches it on disk.

The modules here are the PyTorch side (custom ops, gradients, fake shapes); they import the kernels when first run,
so that importing mambakit does not load Numba.
"""

from __future__ import annotations

import importlib
from types import ModuleType

FILES = {
    "add_rms_norm": "rms_norm",
    "causal_conv1d": "causal_conv1d",
    "causal_conv1d_step": "causal_conv1d",
    "linear_cross_entropy": "cross_entropy",
    "linear_step": "linear",
    "quantised_linear": "quantised_linear",
    "rms_norm": "rms_norm",
    "selective_scan": "selective_scan",
    "selective_scan_step": "selective_scan",
}
"""The file of each op; imported when first asked for."""


def __getattr__(name: str) -> ModuleType:
    if name in FILES.values():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
