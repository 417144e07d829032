"""Linear layers whose backward pass leaves to the matrix products what autograd does in passes of its own.

Autograd cats the gradients of two halves before it multiplies them, adds two gradients of one tensor, and widens the
gradient of a weight that autocast narrowed. The matrix products can do all three on the way, and their float32 sums
then reach the optimizer without having been rounded. On a GPU these passes are some 4 % of a training step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from mambakit.nn.recomputation import is_eager_autograd
from mambakit.ops.gradient_room import GradientRoom
from mambakit.ops.wide_products import multiply

JOINS_ON = ("cuda",)
"""Devices where it is done. On a CPU a pass over memory costs little beside the products."""


def joins_gradients(x: Tensor) -> bool:
    """Whether the layers here are to be used on x."""
    # Float64 runs on the reference, which has second derivatives; joined gradients have none.
    return x.device.type in JOINS_ON and x.dtype != torch.float64 and is_eager_autograd()


def is_narrowed(weight: Tensor, x: Tensor) -> bool:
    """Whether autocast narrows a parameter to multiply it with x, so that its gradient would be widened."""
    return (
        type(weight) is nn.Parameter
        and weight.requires_grad
        and weight.dtype == torch.float32
        and torch.is_autocast_enabled(x.device.type)
    )


def linear_alone(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear(x, weight, bias)`."""
    y: Tensor = _Alone.apply(_as_autocast(x), weight, bias)  # type: ignore[no-untyped-call]
    return y


def linear_in_halves(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`linear(x, weight, bias).chunk(2, dim=-1)`."""
    first, second = _Halves.apply(_as_autocast(x), weight, bias)  # type: ignore[no-untyped-call]
    return first, second


def linear_beside(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x itself, for what else needs it, and `linear(x, weight)`."""
    same, y = _Beside.apply(_as_autocast(x), weight)  # type: ignore[no-untyped-call]
    return same, y


def _as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast multiplies in here, if any."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _factor(parameter: Tensor, x: Tensor) -> Tensor:
    """The parameter as it is multiplied with x."""
    return parameter.to(x.dtype) if torch.is_autocast_enabled(x.device.type) else parameter


class _Alone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        factor = _factor(weight, x)
        ctx.save_for_backward(x, factor)
        ctx.dtype = weight.dtype
        return linear(x, factor, None if bias is None else _factor(bias, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        dx = dweight = dbias = None
        dy = _rows(dy)
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = dy.mm(factor).view(x.shape)
            if ctx.needs_input_grad[1]:
                dweight = multiply(dy.t(), _rows(x), torch.empty_like(factor, dtype=ctx.dtype))
            if ctx.needs_input_grad[2]:
                dbias = dy.sum(0, dtype=ctx.dtype)
        return dx, dweight, dbias


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        factor = _factor(weight, x)
        ctx.save_for_backward(x, factor)
        ctx.dtype, ctx.room = weight.dtype, GradientRoom()
        y = linear(x, factor, None if bias is None else _factor(bias, x))
        first, second = y.chunk(2, dim=-1)
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        parts = [_rows(gradient) for gradient in ctx.room.joined(gradients)]
        dx = dweight = dbias = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                factors = factor.chunk(len(parts))
                dx = parts[0].mm(factors[0])
                for part, rows in zip(parts[1:], factors[1:], strict=True):
                    dx.addmm_(part, rows)
                dx = dx.view(x.shape)
            if ctx.needs_input_grad[1]:
                dweight = torch.empty_like(factor, dtype=ctx.dtype)
                for part, out in zip(parts, dweight.chunk(len(parts)), strict=True):
                    multiply(part.t(), _rows(x), out)
            if ctx.needs_input_grad[2]:
                dbias = torch.cat([part.sum(0, dtype=ctx.dtype) for part in parts])
        return dx, dweight, dbias


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        factor = _factor(weight, x)
        ctx.save_for_backward(x, factor)
        ctx.dtype = weight.dtype
        return x.view_as(x), linear(x, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, factor = ctx.saved_tensors
        dy, dweight = _rows(dy), None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                dweight = multiply(dy.t(), _rows(x), torch.empty_like(factor, dtype=ctx.dtype))
            # Into dx, which nobody else reads: the backward pass of the scan has just made it.
            has_rows = dx.stride(-1) == 1 and dx.stride(-2) >= dx.shape[-1]
            total = _rows(dx if has_rows else dx.contiguous())
            return total.addmm_(dy, factor).view(x.shape), dweight


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
