"""Root-mean-square normalisation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition; arguments as in `mambakit.ops.rms_norm`."""
    real = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(real)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(real)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition; arguments as in `mambakit.ops.add_rms_norm`."""
    real = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    total = x.to(real) + residual.to(real)
    return rms_norm(total, weight, eps).to(x.dtype), total.to(residual.dtype)
