"""Root-mean-square normalisation on the CPU: PyTorch operators around `kernels.rms_norm`."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from mambakit.ops.cpu.arrays import array, vector
from mambakit.ops.cpu.threads import run
from mambakit.ops.operators import Operator


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Arguments as in `mambakit.ops.rms_norm`."""
    y: Tensor = _forward(x, None, weight, eps)[0]
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Arguments as in `mambakit.ops.add_rms_norm`."""
    y, total = _forward(x, residual, weight, eps)
    return y, total


def _run_forward(
    x: Tensor, residual: Optional[Tensor], weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """y, and x + residual (of no elements without a residual)."""
    from mambakit.ops.cpu.kernels.rms_norm import forward

    rows = _rows(x)
    y = torch.empty_like(rows)
    old = None if residual is None else _rows(residual)
    total = None if old is None else torch.empty_like(old)
    run(
        forward, _tasks(rows), array(rows), array(old), vector(weight), np.float32(eps),
        array(y), array(total),
    )  # fmt: skip
    y = y.to(x.dtype).view(x.shape)
    if residual is None or total is None:
        return y, x.new_empty(0)
    return y, total.to(residual.dtype).view(x.shape)


def _fake_forward(x, residual, weight, eps):
    y = x.new_empty(x.shape)
    return y, x.new_empty(0) if residual is None else residual.new_empty(x.shape)


def _run_backward(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    eps: float,
    dy: Tensor,
    dtotal: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of x and residual, which are one, in float32; and of the weight."""
    from mambakit.ops.cpu.kernels.rms_norm import backward

    rows = _rows(x)
    dx = torch.empty(rows.shape)
    dweight = torch.zeros(_tasks(rows), rows.shape[1])
    run(
        backward, _tasks(rows), array(rows), None if residual is None else array(_rows(residual)), vector(weight),
        np.float32(eps), array(_rows(dy)), None if dtotal is None else array(_rows(dtotal)), array(dx), array(dweight),
    )  # fmt: skip
    return dx.view(x.shape), dweight.sum(0).to(weight.dtype)


def _fake_backward(x, residual, weight, eps, dy, dtotal):
    return x.new_empty(x.shape, dtype=torch.float32), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, ctx.eps = inputs
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    if residual is not None and residual.dtype == torch.float32:
        x, residual = output[1], None  # the sum, which the next block keeps anyway
    ctx.save_for_backward(x, residual, weight)


def _gradients(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Any, ...]:
    x_dtype, residual_dtype = ctx.dtypes
    added = residual_dtype is not None
    dx, dweight = _backward(*ctx.saved_tensors, ctx.eps, dy, dtotal if added else None)
    return dx.to(x_dtype), dx.to(residual_dtype) if added else None, dweight, None


_forward = Operator(
    "cpu_rms_norm", "cpu", _run_forward, fake=_fake_forward, setup=_setup, gradients=_gradients
)
_backward = Operator("cpu_rms_norm_backward", "cpu", _run_backward, fake=_fake_backward)


def _rows(x: Tensor) -> Tensor:
    """(..., M) as contiguous (rows, M), float32 or bfloat16."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return flat if flat.dtype == torch.bfloat16 else flat.float()


def _tasks(rows: Tensor) -> int:
    from mambakit.ops.cpu.kernels.rms_norm import ROWS

    return -(-rows.shape[0] // ROWS)
