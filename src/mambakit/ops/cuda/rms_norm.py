"""Root-mean-square normalisation on a GPU: PyTorch operators around `kernels/rms_norm_*.cu`."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from mambakit.ops.cuda.arrays import TYPES, Variants, lanes, multiprocessors, parameter, readable
from mambakit.ops.cuda.compiler import kernel
from mambakit.ops.operators import Operator

FORWARD_NUMBERS = 40
"""Of a row in the registers of one thread: as many as leave room for enough threads."""

BACKWARD_NUMBERS = 12
"""The same; the backward holds four arrays of this size, and reads three rows at a time."""

BACKWARD_THREADS = 640
"""Of a multiprocessor, in the backward: their registers, and what they have on its way, suffice."""


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
    y = x.new_empty(x.shape)
    total = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    if x.numel() == 0:
        return y, total
    rows, old, w = _rows(x), None if residual is None else _rows(residual), parameter(weight)
    constants = _constants(FORWARD_NUMBERS, 128, rows, old, w)
    launch = kernel(
        "rms_norm_forward.cu", "rms_norm_forward", x.device, ADD=int(old is not None), **constants
    )
    count, width = rows.shape
    launch(
        -(-count // int(constants["ROWS"])), int(constants["ROWS"]) * int(constants["THREADS"]),
        rows, rows.stride(0), old, 0 if old is None else old.stride(0), w, eps, y, total, count, width,
    )  # fmt: skip
    return y, total


def _fake_forward(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(0) if residual is None else residual.new_empty(x.shape)


def _run_backward(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    eps: float,
    dy: Tensor,
    dtotal: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in the dtype of dy), of the residual (of no elements where it is the same), of the weight.

    x is the sum with the residual, where that is float32.
    """
    is_sum = x.dtype != dy.dtype
    dx, dresidual = dy.new_empty(x.shape), x.new_empty(0)
    if is_sum or (residual is not None and residual.dtype != dy.dtype):
        dresidual = (x if residual is None else residual).new_empty(x.shape)
    if x.numel() == 0:
        return dx, dresidual, torch.zeros_like(weight)
    rows, dy, w = _rows(x), _rows(dy), parameter(weight)
    old, along = (None if t is None else _rows(t) for t in (residual, dtotal))
    old = rows if is_sum else old
    count, width = rows.shape
    constants = _constants(BACKWARD_NUMBERS, 128, dy, old, w, along, rows)
    block = int(constants["ROWS"]) * int(constants["THREADS"])
    resident = max(1, BACKWARD_THREADS // block)
    blocks = min(-(-count // int(constants["ROWS"])), multiprocessors(x.device) * resident)
    parts = torch.empty(blocks, width, device=x.device)
    constants |= {"FROM": 1 if is_sum else 0 if old is None else 2, "BLOCKS": resident}
    run, add = (
        kernel("rms_norm_backward.cu", name, x.device, **constants)
        for name in ("rms_norm_backward", "rms_norm_add_parts")
    )
    run(
        blocks, block, None if is_sum else rows, rows.stride(0), old, 0 if old is None else old.stride(0), w, eps,
        dy, dy.stride(0), along, 0 if along is None else along.stride(0),
        dx, dresidual if dresidual.numel() else None, parts, count, width,
    )  # fmt: skip
    assert w is not None
    dweight = torch.empty_like(w)
    add(-(-width // 32), 256, parts, dweight, blocks, width)
    return dx, dresidual, dweight.to(weight.dtype)


def _fake_backward(x, residual, weight, eps, dy, dtotal):
    old = x if x.dtype != dy.dtype else residual
    same = old is None or old.dtype == dy.dtype
    dresidual = x.new_empty(0) if same else old.new_empty(x.shape)
    return dy.new_empty(x.shape), dresidual, weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, ctx.eps = inputs
    ctx.x_dtype, ctx.added = x.dtype, residual is not None
    if residual is not None and residual.dtype == torch.float32:
        x, residual = output[1], None  # the sum, which the next block keeps anyway
    ctx.save_for_backward(x, residual, weight)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Any, ...]:
    x, residual, weight = ctx.saved_tensors
    dy = torch.zeros_like(x, dtype=ctx.x_dtype) if dy is None else dy
    dtotal = dtotal if ctx.added else None
    dx, dresidual, dweight = _backward(x, residual, weight, ctx.eps, dy, dtotal)
    old = x if residual is None else residual
    same = old.dtype == dx.dtype
    return dx, (dx if same else dresidual) if ctx.added else None, dweight, None


_forward = Operator(
    "cuda_rms_norm", "cuda", _run_forward, fake=_fake_forward, setup=_setup, gradients=_gradients
)
_backward = Operator("cuda_rms_norm_backward", "cuda", _run_backward, fake=_fake_backward)


def _rows(x: Tensor) -> Tensor:
    """(..., M) as (rows, M) with contiguous rows."""
    return readable(x.reshape(-1, x.shape[-1]))


def _constants(
    most: int,
    block: int,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *others: Tensor | None,
) -> dict[str, int | str]:
    """The constants of a kernel whose threads hold at most so many numbers, if a row is not too long for that."""
    tensors = [t for t in (x, residual, weight, *others) if t is not None]
    fitting = 1 << (most // 3).bit_length() - 1  # so that three vectors hold the usual widths
    bytes_each = max(t.element_size() for t in tensors)
    along = lanes(min(16 // bytes_each, fitting), x.shape[1], *tensors)
    assert weight is not None
    residual_type = next((t for t in (residual, *others) if t is not None), x).dtype
    return {
        "IO": TYPES[x.dtype],
        "RESIDUAL": TYPES[residual_type],
        "PARAMETER": TYPES[weight.dtype],
        **spread(most, block, x.shape[1], along),
    }


def spread(most: int, block: int, width: int, along: int) -> dict[str, int | str]:
    """How a row of this width is spread over threads that move `along` numbers at a time."""
    threads = 32
    while threads < 512 and -(-width // (along * threads)) * along > most:
        threads *= 2
    return {
        "LANES": along,
        "VECTORS": -(-width // (along * threads)),
        "THREADS": threads,
        "ROWS": max(1, block // threads),
    }


def variants() -> Variants:
    """The kernels of the usual widths and dtypes."""
    found: Variants = []
    for io, residual, along, source, width in (
        ("bfloat16", "bfloat16", 8, 2, 768),
        ("bfloat16", "float", 4, 1, 768),
        ("bfloat16", "float", 4, 1, 2560),
        ("float16", "float16", 8, 0, 8192),
        ("float", "float", 4, 0, 2048),
    ):
        types: dict[str, int | str] = {"IO": io, "RESIDUAL": residual, "PARAMETER": "float"}
        forward = {"ADD": int(source > 0), **types, **spread(FORWARD_NUMBERS, 128, width, along)}
        backward = {"FROM": source, **types, **spread(BACKWARD_NUMBERS, 128, width, 4)}
        backward["BLOCKS"] = max(1, BACKWARD_THREADS // max(128, int(backward["THREADS"])))
        found.append(("rms_norm_forward.cu", "rms_norm_forward", forward))
        found.append(("rms_norm_backward.cu", "rms_norm_backward", backward))
    return found
