"""Parameters and states in blocks of `LANES` channels, the form in which the scan's kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16


def cut_channels(batch: int, d_inner: int) -> tuple[int, int]:
    """(groups, blocks of `LANES` channels in a group), from the shape alone, so that sums have a fixed order.

    Eight blocks read long rows and share the sums of dB and dC; fewer if that left less than eight tasks.
    """
    blocks = 8
    while blocks > 1 and batch * -(-d_inner // (blocks * LANES)) < 8:
        blocks //= 2
    return -(-d_inner // (blocks * LANES)), blocks


def to_blocks(parameter: Tensor, groups: int, blocks: int) -> Tensor:
    """(..., D, N) as (..., groups, blocks, N, LANES), or (..., N, 2, LANES) of complex: float32, padded with zeros."""
    *outer, d_inner, _ = parameter.shape
    numbers = torch.view_as_real(parameter) if parameter.is_complex() else parameter
    inner = numbers.shape[parameter.ndim - 1 :]
    padded = numbers.new_zeros(*outer, groups * blocks * LANES, *inner, dtype=torch.float32)
    padded.narrow(len(outer), 0, d_inner).copy_(numbers)
    lanes = padded.view(*outer, groups, blocks, LANES, *inner)
    return lanes.movedim(len(outer) + 2, -1).contiguous()


def from_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_blocks`, with as many channels as `like` (D, N), and complex if that is."""
    dim = blocks.ndim - (5 if like.is_complex() else 4)
    padded = blocks.movedim(-1, dim + 2).flatten(dim, dim + 2)
    numbers = padded.narrow(dim, 0, like.shape[0]).contiguous()
    return torch.view_as_complex(numbers) if like.is_complex() else numbers
