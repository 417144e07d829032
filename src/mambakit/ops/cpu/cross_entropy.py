"""Cross-entropy of a linear layer on the CPU: a block of rows at a time, the gradients made along with the loss.

The logits of a block are needed twice, for the loss and for its gradient (softmax - one-hot). Making both while the
block exists saves the third of the matrix products that computing the logits again would cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.ops.cpu.arrays import array
from mambakit.ops.cpu.threads import run
from mambakit.ops.operators import Operator

LOGITS_BYTES = 128 * 2**20
"""Memory of the logits of one block, in float32."""


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss, its gradients of hidden and (in float32) of weight; what is not asked for has no elements."""
    from mambakit.ops.cpu.kernels.cross_entropy import softmax_loss

    rows, vocab = hidden.shape[0], weight.shape[0]
    block = max(1, LOGITS_BYTES // (4 * vocab))
    matrix = weight.to(hidden.dtype)
    counted = targets != ignore_index
    weights = torch.where(counted, 1 / counted.sum(dtype=torch.float32), 0)
    classes = torch.where(counted, targets, 0)
    losses = torch.empty(rows)
    dhidden = torch.empty_like(hidden) if of_hidden else hidden.new_empty(0)
    dweight = torch.zeros(weight.shape if of_weight and rows == 0 else 0)

    for start in range(0, rows, block):
        part = slice(start, start + block)
        logits = hidden[part] @ matrix.t()
        values = logits.float() if logits.dtype == torch.float16 else logits
        run(
            softmax_loss, len(values), array(values), array(classes[part]), array(weights[part]),
            array(losses[part]), of_hidden or of_weight,
        )  # fmt: skip
        dlogits = values.to(hidden.dtype) if of_hidden or of_weight else values
        if of_hidden:
            torch.matmul(dlogits, matrix, out=dhidden[part])
        if of_weight:
            product = (dlogits.t() @ hidden[part]).float()
            dweight = product if start == 0 else dweight.add_(product)
    return losses.sum() / counted.sum(), dhidden, dweight


def _fake_forward(hidden, weight, targets, ignore_index, of_hidden, of_weight):
    dhidden = hidden.new_empty(hidden.shape if of_hidden else 0)
    dweight = weight.new_empty(weight.shape if of_weight else 0, dtype=torch.float32)
    return hidden.new_empty((), dtype=torch.float32), dhidden, dweight


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, weight, _, _, *ctx.asked = inputs
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)  # Zeros for the gradients are as large as the weight.


def _gradients(ctx: Any, dloss: Tensor, _dhidden: None, _dweight: None) -> tuple[Any, ...]:
    dhidden, dweight = ctx.saved_tensors
    # The usual dloss spares a pass over what may be the largest matrix of the model. (A subclass
    # of Tensor is a stand-in without a value: someone compiles.)
    if type(dloss) is not Tensor or dloss != 1:
        dhidden, dweight = dhidden * dloss.to(dhidden.dtype), dweight * dloss
    of_hidden, of_weight = ctx.asked
    return (
        dhidden if of_hidden else None,
        dweight.to(ctx.weight_dtype) if of_weight else None,
        None, None, None, None,
    )  # fmt: skip


_forward = Operator(
    "cpu_linear_cross_entropy", "cpu", _run_forward,
    fake=_fake_forward, setup=_setup, gradients=_gradients,
)  # fmt: skip
