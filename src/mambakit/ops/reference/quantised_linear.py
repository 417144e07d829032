"""The linear layer of a quantised weight in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from mambakit.ops.quantisation import QuantisedWeight, dequantise


def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """The definition; arguments as in `mambakit.ops.quantised_linear.quantised_linear`."""
    return linear(x, dequantise(weight, x.dtype), bias)
