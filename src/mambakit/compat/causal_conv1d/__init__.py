"""The package `causal_conv1d` (Dao-AILab/causal-conv1d) on our convolution."""

from __future__ import annotations

from mambakit.compat.causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_update,
)

__version__ = "1.7.0+mambakit"
"""The version whose functions these are."""

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
