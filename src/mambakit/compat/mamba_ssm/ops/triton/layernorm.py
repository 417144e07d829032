"""`mamba_ssm.ops.triton.layernorm`, the older name of `layer_norm`."""

from __future__ import annotations

from mambakit.compat.mamba_ssm.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    rms_norm_fn,
)

__all__ = ["RMSNorm", "layer_norm_fn", "layer_norm_linear_fn", "rms_norm_fn"]
