"""`mamba_ssm.ops.triton`; nothing here uses Triton."""

from __future__ import annotations

from mambakit.compat.mamba_ssm.ops.triton import layer_norm, layernorm, selective_state_update

__all__ = ["layer_norm", "layernorm", "selective_state_update"]
