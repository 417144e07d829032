"""The package `causal_conv1d` (Dao-AILab/causal-conv1d) on our convolution."""

from __future__ import annotations

from mambakit.compat.causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_update,
)
from mambakit.compat.versions import CAUSAL_CONV1D

__version__ = CAUSAL_CONV1D

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
