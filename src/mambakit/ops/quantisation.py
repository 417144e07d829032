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

_CLIPS: dict[int, tuple[float, ...]] = {8: (), 4: (0.95, 0.9, 0.85, 0.8, 0.75)}
"""Parts of the largest number of a group that its codes may end at; the best one is taken. Eight bits gain nothing."""
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
    so the scale has the sign opposite to that number. With four bits, codes that end before it are tried too, and those
    of the least squared error are taken.

    Args:
        weight: (O, K), any float dtype.
        bits: 8 or 4.
        group_size: 32, 64 or 128.

    Returns:
        Codes and scales. With eight bits the error of a weight is at most 1.26 |scale|, and typically half of one.

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
    parts = [_quantise_rows(part.detach(), bits, group_size) for part in torch.split(weight, rows)]
    codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return QuantisedWeight(codes, scales, weight.shape[1])


def dequantise(weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix, (O, K): products of code and scale in float32 (float64 if that is asked for), rounded to dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    codes = weight.codes if weight.bits == 8 else _unpack(weight.codes)
    groups = _split(codes.to(wide), weight.scales.shape[1], weight.group_size)
    whole = (groups * weight.scales.to(wide)[..., None]).flatten(1)
    return whole[:, : weight.columns].to(dtype)


def _quantise_rows(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    padded = pad(weight.float(), (0, -weight.shape[1] % max(BLOCK, group_size)))
    groups = _split(padded, padded.shape[1] // group_size, group_size)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    error, codes, scales = _rounded(groups, extreme, bits)
    for clip in _CLIPS[bits]:
        other = _rounded(groups, clip * extreme, bits)
        is_better = other[0] < error
        error, codes, scales = (
            torch.where(is_better, new, old)
            for new, old in zip(other, (error, codes, scales), strict=True)
        )
    flat = codes.to(torch.int8).flatten(1)
    return flat if bits == 8 else _pack(flat), scales.squeeze(-1).bfloat16()


def _rounded(groups: Tensor, lowest: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error, codes and scale of each group if `lowest` becomes the lowest code; float32."""
    last = -(2 ** (bits - 1))
    scale = (lowest / last).bfloat16().float()
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (groups / scale).round().clamp(last, -last - 1)
    return (codes * scale - groups).square().sum(-1, keepdim=True), codes, scale


def _split(tensor: Tensor, *sizes: int) -> Tensor:
    """(O, K) as (O, *sizes)."""
    return tensor.reshape(tensor.shape[0], *sizes)


def _pack(codes: Tensor) -> Tensor:
    """Codes of four bits, (O, K') int8, as words of four, (O, K' / 4) int16."""
    first, second, third, fourth = _split(
        codes.to(torch.int16), codes.shape[1] // 64, 4, 16
    ).unbind(2)
    words = (first & 15) | (second & 15) << 4 | (third & 15) << 8 | fourth << 12
    return words.flatten(1)


def _unpack(words: Tensor) -> Tensor:
    """The inverse of `_pack`, int16."""
    blocks = _split(words, words.shape[1] // 16, 16)
    nibbles = torch.stack([(blocks >> 4 * k) & 15 for k in range(4)], dim=2)
    return ((nibbles ^ 8) - 8).flatten(1)
