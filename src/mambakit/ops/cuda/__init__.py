"""CUDA kernels: C++ in `kernels/`, compiled at run time by NVRTC through cuda-core and cached on disk.

The modules here are the PyTorch side (custom ops, gradients, fake shapes). They reach a kernel with `compiler.kernel`,
which imports cuda-core at the first call, so that importing mambakit needs neither it nor a GPU.
"""

from __future__ import annotations

import importlib
from types import ModuleType

FILES = {
    "add_rms_norm": "rms_norm",
    "causal_conv1d": "causal_conv1d",
    "causal_conv1d_linear": "causal_conv1d_linear",
    "causal_conv1d_step": "causal_conv1d",
    "likeliest": "likeliest",
    "linear_cross_entropy": "cross_entropy",
    "model_step": "model_step",
    "quantised_linear": "quantised_linear",
    "rms_norm": "rms_norm",
    "selective_scan": "selective_scan",
    "selective_scan_step": "selective_scan_step",
}
"""The file of each op; imported when first asked for."""


def __getattr__(name: str) -> ModuleType:
    if name in FILES.values():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
