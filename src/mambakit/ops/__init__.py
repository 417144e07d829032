"""The mathematics: one public function per operation, one folder per backend.

`reference` is the definition (plain PyTorch, any float dtype, differentiable twice); `cpu` is compiled with Numba;
`cuda` is CUDA C++ compiled at run time.
Every function takes `backend="auto"`; see `mambakit.ops.dispatch`.
"""

from mambakit.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from mambakit.ops.cross_entropy import linear_cross_entropy
from mambakit.ops.rms_norm import add_rms_norm, rms_norm
from mambakit.ops.selective_scan import selective_scan, selective_scan_step

__all__ = [
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_step",
    "linear_cross_entropy",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
]
