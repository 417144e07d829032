"""The tensors of a layer, as the backends take them that do a decoding step of a whole model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Layer(NamedTuple):
    """A layer with real A, everything selective, a convolution with a bias and projections without one.

    A matrix is a float tensor, and its scales None, or codes and scales as in `mambakit.ops.quantisation`.
    """

    norm: Tensor
    """(M,)."""
    in_proj: Tensor
    """(2 D, M)."""
    conv: Tensor
    """(D, 1, W)."""
    conv_bias: Tensor
    """(D,)."""
    x_proj: Tensor
    """(R + 2 N, D)."""
    dt_proj: Tensor
    """(D, R)."""
    dt_bias: Tensor
    """(D,)."""
    A_log: Tensor
    """(D, N)."""
    D: Tensor
    """(D,)."""
    out_proj: Tensor
    """(M, D)."""
    conv_state: Tensor
    """(B, D, W-1)."""
    ssm_state: Tensor
    """(B, D, N)."""
    in_scales: Tensor | None = None
    x_scales: Tensor | None = None
    dt_scales: Tensor | None = None
    out_scales: Tensor | None = None
