"""Random numbers that are a function of a seed and a position, and of nothing else.

    u(seed, position) = mix(key + position * GOLDEN) / 2^64,  key = mix(seed + GOLDEN)

`mix` is the finaliser of SplitMix64 (Steele, Lea & Flood 2014, doi 10.1145/2660193.2660195, with the
constants of Stafford's variant 13), so the numbers of a seed are a stream of that generator from a
place of its own. There is no state: a number can be drawn on any device, in any batch, in any order,
and within a CUDA graph, and a sequence that is taken up again goes on as it would have.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def key_of(seed: int) -> int:
    """Where the numbers of a seed begin, as a signed 64-bit integer."""
    bits = (seed + _GOLDEN) & _MASK
    bits = ((bits ^ bits >> 30) * _FIRST) & _MASK
    bits = ((bits ^ bits >> 27) * _SECOND) & _MASK
    return _signed(bits ^ bits >> 31)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """A number from 0 up to 1, a multiple of 2^-32, for each key and position: int64 to float64.

    Example:
        >>> keys = torch.tensor([key_of(0), key_of(1), key_of(0)])
        >>> drawn = uniform(keys, torch.tensor([5, 5, 5]))
        >>> bool(drawn[0] == drawn[2]), bool(drawn[0] == drawn[1])
        (True, False)
    """
    bits = keys + positions * _signed(_GOLDEN)
    bits = (bits ^ _shifted(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shifted(bits, 27)) * _signed(_SECOND)
    bits = bits ^ _shifted(bits, 31)
    return _shifted(bits, 32).to(torch.float64) * 2.0**-32


def _shifted(bits: Tensor, count: int) -> Tensor:
    """The 64 bits moved right, zeros coming in; PyTorch's own shift repeats the sign."""
    moved: Tensor = (bits >> count) & (2 ** (64 - count) - 1)
    return moved


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits
