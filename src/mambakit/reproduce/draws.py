"""Random integers as a function of seed and step: fresh data every step, the same after an interruption."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 2**64
_INCREMENT = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


class Draws:
    """Uniform integers for a run of steps, made on the device of `steps` by operations a CUDA graph can hold.

    Number i of draw d of step s is output s n + i of the generator SplitMix64, whose state starts at a hash of
    (seed, stream, d); n is the count of numbers that the draw takes a step. So nothing is remembered between steps.

    Args:
        seed: Seed of the run.
        stream: Number of an independent sequence: training, validation and test must not share one.
        steps: The steps to draw for, (K,), int64.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", section 5 (variant 13).

    Example:
        >>> import torch
        >>> from mambakit.reproduce import Draws
        >>> both = Draws(seed=0, stream=0, steps=torch.arange(2)).integers(10, 3)
        >>> later = Draws(seed=0, stream=0, steps=torch.tensor([1])).integers(10, 3)
        >>> torch.equal(both[1:], later)
        True
    """

    def __init__(self, seed: int, stream: int, steps: Tensor) -> None:
        self._origin = _mix_integer(seed) ^ _mix_integer(_INCREMENT + stream)
        self._steps = steps
        self._draws = 0

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers from 0 to high - 1, high at most 2^31, (K, *shape), int64; the bias is below high / 2^31."""
        numbers: Tensor = (self.bits(*shape) >> 32) * high >> 31
        return numbers

    def bits(self, *shape: int) -> Tensor:
        """Integers from 0 to 2^63 - 1, (K, *shape), int64."""
        count = math.prod(shape)
        self._draws += 1
        origin = _mix_integer(self._origin + self._draws * _INCREMENT)
        numbers = torch.arange(count, device=self._steps.device)
        numbers = self._steps[:, None] * count + numbers
        return _mix(numbers * _signed(_INCREMENT) + _signed(origin)).view(-1, *shape)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output of each state, without its highest bit; products wrap around at 64 bits."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return (z ^ _shifted(z, _SHIFTS[-1])) & (2**63 - 1)


def _shifted(z: Tensor, shift: int) -> Tensor:
    """Shift to the right without copies of the sign, which int64 has and SplitMix64's numbers do not."""
    shifted: Tensor = (z >> shift) & (2 ** (64 - shift) - 1)
    return shifted


def _mix_integer(z: int) -> int:
    z %= _WORD
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        z = (z ^ z >> shift) * factor % _WORD
    return z ^ z >> _SHIFTS[-1]


def _signed(z: int) -> int:
    """The int64 of the same 64 bits."""
    z %= _WORD
    return z - _WORD if z >= _WORD // 2 else z
