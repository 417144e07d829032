"""Cross-entropy of a linear layer in plain PyTorch, a block of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

ROWS = 256
"""Rows of logits that exist at a time; the backward computes them again."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> Tensor:
    """The definition; arguments as in `mambakit.ops.linear_cross_entropy`."""
    real = torch.promote_types(hidden.dtype, torch.float32)
    counted = (targets != ignore_index).sum()

    def total(rows: Tensor, targets: Tensor) -> Tensor:
        logits = linear(rows, weight.to(rows.dtype)).to(real)
        return cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")

    blocks = zip(torch.split(hidden, ROWS), torch.split(targets, ROWS), strict=True)
    losses = [checkpoint(total, *block, use_reentrant=False) for block in blocks]
    return torch.stack(losses).sum() / counted if losses else hidden.sum() / counted
