"""Cross-entropy of a linear layer on a GPU: a block of rows at a time, the gradients made along with the loss.

A block of logits is made by a matrix product, read and overwritten with its gradient by one kernel, used by two more
products, and forgotten. Nothing waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.ops.cuda.arrays import TYPES, Variants, shared_memory
from mambakit.ops.cuda.compiler import kernel
from mambakit.ops.operators import Operator
from mambakit.ops.wide_products import multiply, multiply_add

LOGITS_BYTES = 2**30
"""Most memory of the logits of one block. The larger, the less often the gradient of weight is read and written."""

TILE = 256
"""Rows of a block are a multiple of this, so that the products fill their tiles."""

THREADS = 512


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> Tensor:
    """Arguments as in `mambakit.ops.linear_cross_entropy`."""
    of_hidden = torch.is_grad_enabled() and hidden.requires_grad
    of_weight = torch.is_grad_enabled() and weight.requires_grad
    loss: Tensor = _forward(hidden, weight, targets, ignore_index, of_hidden, of_weight)[0]
    return loss


def _run_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean loss; the gradients of the sum of the losses, in float32 for weight; the number of counted rows.

    Divided by that number they would be too small for float16, so that is left to the backward pass. Gradients that are
    not asked for have no elements.
    """
    (rows, width), vocab = hidden.shape, weight.shape[0]
    matrix, targets = weight.to(hidden.dtype), targets.contiguous()
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    dhidden = hidden.new_empty((rows, width) if of_hidden else 0)
    make = losses.new_empty if rows else losses.new_zeros
    dweight = make((vocab, width) if of_weight else 0)
    lanes = 16 // hidden.element_size()
    stride = -(-vocab // lanes) * lanes  # Rows begin at multiples of 16 bytes.
    block = rows_of_block(rows, stride * hidden.element_size())
    buffer = hidden.new_empty(block, stride)

    for start in range(0, rows, block):
        part = slice(start, start + block)
        logits = buffer[: len(losses[part]), :vocab]
        multiply(hidden[part], matrix.t(), logits)
        softmax_(logits, targets[part], losses[part], ignore_index, of_hidden or of_weight)
        if of_hidden:
            multiply(logits, matrix, dhidden[part])
        if of_weight:
            (multiply_add if start else multiply)(logits.t(), hidden[part], dweight)
    counted = (targets != ignore_index).sum()
    return losses.sum() / counted, dhidden, dweight, counted


def _fake_forward(hidden, weight, targets, ignore_index, of_hidden, of_weight):
    loss = hidden.new_empty((), dtype=torch.float32)
    dhidden = hidden.new_empty(hidden.shape if of_hidden else 0)
    dweight = weight.new_empty(weight.shape if of_weight else 0, dtype=torch.float32)
    return loss, dhidden, dweight, targets.new_empty(())


def _run_backward(
    dloss: Tensor, dhidden: Tensor, dweight: Tensor, counted: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and weight."""
    # With one dimension, the factor counts as float32 in the product; a scalar would be rounded to bfloat16 first.
    factor = (dloss / counted.clamp(min=1)).reshape(1)

    def scaled(gradient: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))

    return scaled(dhidden, dhidden.dtype), scaled(dweight, weight_dtype)


def _fake_backward(dloss, dhidden, dweight, counted, weight_dtype):
    return torch.empty_like(dhidden), torch.empty_like(dweight, dtype=weight_dtype)


def _setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    _, weight, _, _, *ctx.asked = inputs
    ctx.weight_dtype = weight.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Any, ...]:
    gradients = _backward(dloss, *ctx.saved_tensors, ctx.weight_dtype)
    dhidden, dweight = (g if asked else None for g, asked in zip(gradients, ctx.asked, strict=True))
    return dhidden, dweight, None, None, None, None


_forward = Operator(
    "cuda_linear_cross_entropy", "cuda", _run_forward,
    fake=_fake_forward, setup=_setup, gradients=_gradients,
)  # fmt: skip
_backward = Operator(
    "cuda_linear_cross_entropy_backward", "cuda", _run_backward, fake=_fake_backward
)


def rows_of_block(rows: int, row_bytes: int) -> int:
    """Rows of logits that exist at a time: blocks of one size, as few as `LOGITS_BYTES` allows."""
    most = max(1, LOGITS_BYTES // row_bytes)
    blocks = max(1, -(-rows // most))
    even = -(-rows // blocks)
    tiled = -(-even // TILE) * TILE
    return max(1, tiled if tiled <= most else even)


def variants() -> Variants:
    """Every kernel there is."""
    return [
        ("cross_entropy.cu", "cross_entropy", _constants(dtype, gradients))
        for dtype in TYPES
        for gradients in (False, True)
    ]


def _constants(dtype: torch.dtype, gradients: bool) -> dict[str, int | str]:
    return {"IO": TYPES[dtype], "THREADS": THREADS, "GRADIENTS": int(gradients)}


def softmax_(
    logits: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, gradients: bool
) -> None:
    """Put the losses of rows of logits into `losses` and, if asked for, their gradients into `logits`.

    Args:
        logits: (rows, V), each row at an address of 16 bytes.
        targets: (rows,), int64, contiguous.
        losses: (rows,), float32.
        ignore_index: Rows with this target have a loss and a gradient of 0.
        gradients: Whether to overwrite `logits`.
    """
    run = kernel(
        "cross_entropy.cu", "cross_entropy", logits.device, **_constants(logits.dtype, gradients)
    )
    rows, vocab = logits.shape
    row_bytes = logits.stride(0) * logits.element_size()
    kept = min(row_bytes, _shared_bytes(logits.device)) // 16 if gradients else 0
    run(
        rows, THREADS, logits, targets, losses, vocab, logits.stride(0), ignore_index, kept,
        shared=16 * kept,
    )  # fmt: skip


def _shared_bytes(device: torch.device) -> int:
    """Shared memory of a block that leaves room for a second one: while one reads, the other writes."""
    reserved, sums = 1024, 2 * 4 * THREADS // 32  # by the system; in the kernel
    return shared_memory(device) // 2 - reserved - sums
