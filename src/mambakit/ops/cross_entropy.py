"""The loss of a language model's head: cross-entropy of a linear layer, without ever holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.errors import ArgumentError
from mambakit.ops.checks import check_device, check_float, check_integer, check_rank, check_shape
from mambakit.ops.dispatch import implementation, resolve_backend


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Mean cross-entropy of softmax(hidden weight^T) over the counted targets.

        loss = mean over counted i of  logsumexp_v(<hidden_i, weight_v>) - <hidden_i, weight_{target_i}>

    The logits (rows x V) exist only a block of rows at a time, in the forward and in the backward.

    Args:
        hidden: (..., M), any float dtype. Under autocast the matrix products run in the autocast dtype.
        weight: (V, M).
        targets: Class of each row, (...), int32 or int64, in [0, V), or `ignore_index`.
        ignore_index: Rows with this target do not count.
        backend: "auto", "cuda", "cpu" or "reference"; see `mambakit.ops.dispatch`.

    Returns:
        The loss in nats, a float32 scalar (float64 for float64 hidden); nan if no target counts.

    Raises:
        ShapeError, DtypeError: An argument does not fit.
        ArgumentError: A target lies outside [0, V). The cuda backend does not raise, since it would have to wait for
            the GPU: its loss and gradients are nan then.
        BackendError: The named backend cannot run this call here.

    Numerics: softmax, sums and the gradient of weight in float32; logits in the dtype of the matrix products.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(3, 2), torch.zeros(4, 2)
        >>> linear_cross_entropy(hidden, weight, torch.tensor([0, 3, -100]))  # ln 4
        tensor(1.3863)
    """
    check_rank("weight", weight, 2, "(V, M)")
    vocab, width = weight.shape
    check_shape("hidden", hidden, (*targets.shape, width), letters="(..., M) with ... of targets")
    check_float(hidden=hidden, weight=weight)
    check_integer(targets=targets)
    check_device(hidden, weight=weight, targets=targets)
    hidden, targets = hidden.reshape(-1, width), targets.reshape(-1)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    chosen = resolve_backend(backend, hidden.device, hidden.dtype)
    if chosen != "cuda" and not torch.compiler.is_compiling():
        _check_targets(targets, vocab, ignore_index)
    run = implementation("linear_cross_entropy", chosen, hidden.device, hidden.dtype)
    loss: Tensor = run(hidden, weight, targets.long(), ignore_index)
    return loss


def _check_targets(targets: Tensor, vocab: int, ignore_index: int) -> None:
    wrong = targets[((targets < 0) | (targets >= vocab)) & (targets != ignore_index)]
    if wrong.numel():
        raise ArgumentError(
            f"targets: got class {int(wrong[0])}, wanted 0 <= class < {vocab} (or {ignore_index})"
        )
