"""The linear layer in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition; arguments as in `mambakit.ops.linear.linear_step`."""
    return linear(x, weight, bias)
