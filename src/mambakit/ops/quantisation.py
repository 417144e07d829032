"""Matrices as small integers with one scale a group: a weight in a half or a quarter of bfloat16's memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mambakit.errors import ArgumentError
from mambakit.ops.checks import check_float, check_rank

BITS = (8, 4)
GROUP_SIZES = (32, 64, 128)
BLOCK = 64
"""Rows are padded with zeros to a multiple of this, or of the group size if that is larger."""

_CLIPS = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}
"""Parts of the largest number of a group that its codes reach to; the best one is taken. Eight bits gain nothing."""
_NUMBERS_AT_ONCE = 2**22


class QuantisedWeight(NamedTuple):
    """A matrix (O, K) as codes and scales: weight = scale * code.

    K' is K rounded up to whole blocks and groups. Four bits are packed so that a vector of words gives neighbouring
    codes by a shift: bits 4k to 4k + 3 of word 16 b + i of a row are its code 64 b + 16 k + i.

    Attributes:
        codes: From -2^(bits-1) to 2^(bits-1) - 1; eight bits int8 (O, K'), four bits int16 (O, K' / 4).
        scales: Of each group of neighbouring columns, (O, K' / group_size), bfloat16; may be negative.
        columns: K.
    """

    codes: Tensor
    scales: Tensor
    columns: int

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def padded_columns(self) -> int:
        """K'."""
        return self.codes.shape[1] * (1 if self.bits == 8 else 4)

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.padded_columns // self.scales.shape[1]


def quantise_weight(weight: Tensor, bits: int, group_size: int) -> QuantisedWeight:
    """Round a matrix to integers.

    The number of largest magnitude in a group becomes the lowest code, since there is one more below zero than above;
    so the scale has the sign opposite to that number. With four bits, codes that end before it are tried too, and those of the
    least squared error are taken.

    Args:
        weight: (O, K), any float dtype.
        bits: 8 or 4.
        group_size: 32, 64 or 128.

    Returns:
        Codes and scales. The error is at most 1.25 |scale| for each weight with eight bits, and 1.02 |scale| with four where
        nothing was cut off.

    Raises:
        ArgumentError: An argument is not one of these.
    """
    check_rank("weight", weight, 2, "(O, K)")
    check_float(weight=weight)
    if bits not in BITS:
        raise ArgumentError(f"bits: got {bits}, wanted one of {BITS}")
    if group_size not in GROUP_SIZES:
        raise ArgumentError(f"group_size: got {group_size}, wanted one of {GROUP_SIZES}")
    rows = max(1, _NUMBERS_AT_ONCE // max(1, weight.shape[1]))
    parts = [_quantise_rows(part.detach(), bits, group_size) for part in weight.split(rows)]
    codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return QuantisedWeight(codes, scales, weight.shape[1])


def dequantise(weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix, (O, K): products of code and scale in float32 (float64 if that is asked for), rounded to dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    codes = weight.codes if weight.bits == 8 else _unpack(weight.codes)
    groups = codes.to(wide).unflatten(1, (weight.scales.shape[1], -1))
    return (groups * weight.scales.to(wide)[..., None]).flatten(1)[:, : weight.columns].to(dtype)


def _quantise_rows(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    unit = max(BLOCK, group_size)
    groups = pad(weight.float(), (0, -weight.shape[1] % unit)).unflatten(1, (-1, group_size))
    lowest = -(2 ** (bits - 1))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = codes = scales = None
    for clip in _CLIPS[bits]:
        scale = (extreme * (clip / lowest)).bfloat16().float()
        scale = torch.where(scale == 0, 1.0, scale)
        code = (groups / scale).round().clamp(lowest, -lowest - 1)
        error = (code * scale - groups).square().sum(-1, keepdim=True)
        if best is None or codes is None or scales is None:
            best, codes, scales = error, code, scale
        else:
            is_better = error < best
            best, codes, scales = (
                torch.where(is_better, new, old)
                for new, old in ((error, best), (code, codes), (scale, scales))
            )
    assert codes is not None and scales is not None
    flat = codes.to(torch.int8).flatten(1)
    return flat if bits == 8 else _pack(flat), scales.squeeze(-1).bfloat16()


def _pack(codes: Tensor) -> Tensor:
    """Codes of four bits, (O, K') int8, as words of four, (O, K' / 4) int16."""
    first, second, third, fourth = codes.to(torch.int16).unflatten(1, (-1, 4, 16)).unbind(2)
    words = (first & 15) | (second & 15) << 4 | (third & 15) << 8 | fourth << 12
    return words.flatten(1)


def _unpack(words: Tensor) -> Tensor:
    """The inverse of `_pack`, int16."""
    blocks = words.unflatten(1, (-1, 16))
    nibbles = torch.stack([(blocks >> 4 * k) & 15 for k in range(4)], dim=2)
    return ((nibbles ^ 8) - 8).flatten(1)
