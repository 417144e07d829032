"""The linear layers of the model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mambakit.nn.joined_gradients import is_narrowed, joins_gradients, linear_alone
from mambakit.ops.cpu.features import slow_bfloat16
from mambakit.ops.linear import linear_step


class Linear(nn.Linear):
    """`nn.Linear`, with a faster product for the few rows of a decoding step: `linear_step`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) to (..., O)."""
        return product(input, self.weight, self.bias)


class DtProjection(Linear):
    """Projection from rank R to dt, whose bias the scan adds, in float32, not this layer.

    Args:
        dt_rank: Size of the input (R).
        bias: Initial bias, (D,).
        init: "random" draws the weight uniformly from +-scale / sqrt(R); "constant" takes the
            upper end.
        scale: See init.
    """

    def __init__(self, dt_rank: int, bias: Tensor, init: str, scale: float) -> None:
        super().__init__(dt_rank, bias.numel())
        bound = scale / math.sqrt(dt_rank)
        nn.init.uniform_(self.weight, -bound if init == "random" else bound, bound)
        self.bias = nn.Parameter(bias)

    def forward(self, input: Tensor) -> Tensor:
        """(..., R) to (..., D), without the bias."""
        return product(input, self.weight, None)


def project_to(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """A `DtProjection` as a function of input and weight, which makes outputs of this dtype.

    That is what autocast makes of the layer, wherever it is in force.
    """
    return lambda input, weight: linear(input.to(dtype), weight.to(dtype))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias as these layers compute it, (..., K) to (..., O)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        if is_narrowed(weight, x) and joins_gradients(x):
            return linear_alone(x, weight, bias)
        return linear(x, weight, bias)
    if x.ndim == 2:
        return linear_step(x, weight, bias)
    if x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu" and slow_bfloat16():
        # A weight takes a twentieth as long to widen as to multiply with a prompt.
        wide = linear(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(x.dtype)
    return linear(x, weight, bias)
