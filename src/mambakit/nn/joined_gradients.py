"""Linear layers whose backward pass adds gradients where they are, instead of copying them together.

Autograd cats the gradients of two halves before it multiplies them, and adds two gradients of one tensor in a pass of
its own. The matrix products can do both on the way. On a GPU these passes are some 3 % of a training step, by count of
bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def linear_in_halves(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`linear(x, weight, bias).chunk(2, dim=-1)`."""
    first, second = _Halves.apply(*_as_autocast(x, weight, bias))  # type: ignore[no-untyped-call]
    return first, second


def linear_beside(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x itself, for what else needs it, and `linear(x, weight)`."""
    x, weight, _ = _as_autocast(x, weight, None)
    same, y = _Beside.apply(x, weight)  # type: ignore[no-untyped-call]
    return same, y


def _as_autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors in the dtype that autocast multiplies in here, if any."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        first, second = linear(x, weight, bias).chunk(2, dim=-1)
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        parts = [_rows(gradient) for gradient in gradients]
        dx = dweight = dbias = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                first, second = weight.chunk(2)
                dx = parts[0].mm(first).addmm_(parts[1], second).view(x.shape)
            if ctx.needs_input_grad[1]:
                dweight = torch.empty_like(weight)
                for part, out in zip(parts, dweight.chunk(2), strict=True):
                    torch.mm(part.t(), _rows(x), out=out)
            if ctx.needs_input_grad[2]:
                dbias = torch.cat([part.sum(0) for part in parts])
        return dx, dweight, dbias


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return x.view_as(x), linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = _rows(dy)
        with torch.autocast(x.device.type, enabled=False):
            dweight = dy.t().mm(_rows(x)) if ctx.needs_input_grad[1] else None
            # Into dx, which nobody else reads: the backward pass of the scan has just made it.
            return _rows(dx.contiguous()).addmm_(dy, weight).view(x.shape), dweight


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
