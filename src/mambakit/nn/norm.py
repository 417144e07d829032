"""Root-mean-square normalisation of the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambakit.ops import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, computed in float32.

    Args:
        d_model: Size of the normalised dimension (M).
        eps: Added to the mean square.
    """

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (..., M); the result has its dtype."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add x to the residual stream; return the normalised sum (dtype of x) and the sum."""
        return add_rms_norm(x, residual, self.weight, self.eps)
