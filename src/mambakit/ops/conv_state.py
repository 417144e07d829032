"""What the causal convolution remembers: its last W - 1 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

FAR_BACK = -(2**31)
"""A start that no filter reaches across."""


def initial(x: Tensor, width: int, state: Tensor | None) -> Tensor:
    """The W - 1 inputs before position 0 as rows, (B, W-1, D), in the dtype of x."""
    batch, _, channels = x.shape
    if state is None:
        return x.new_zeros(batch, width - 1, channels)
    return state.to(x.dtype).transpose(1, 2)


def final(x: Tensor, past: Tensor, seq_idx: Tensor | None) -> Tensor:
    """The last W - 1 inputs, (B, D, W-1), zero where they belong to an earlier document than the last."""
    seqlen, kept = x.shape[1], past.shape[1]
    inputs = torch.cat([past, x[:, max(seqlen - kept, 0) :]], dim=1)
    last = inputs[:, inputs.shape[1] - kept :]
    if seq_idx is not None and seqlen > 0 and kept > 0:
        distance = torch.arange(kept - 1, -1, -1, device=x.device)
        last = last * (distance <= age(seq_idx)[:, -1:])[..., None]
    return last.transpose(
        1, 2
    ).contiguous()  # As the steps take it; and a view would keep all of `inputs`.


def age(seq_idx: Tensor) -> Tensor:
    """Steps since the document of each position began, (B, L); past any filter's reach in the document of position 0.

    Documents are runs of one number: a number that comes back later is a new document.
    """
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    starts = torch.full_like(seq_idx, FAR_BACK, dtype=torch.int64)
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts[:, 1:] = torch.where(changes, position[1:], FAR_BACK)
    return position - starts.cummax(dim=1).values
