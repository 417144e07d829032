"""A pseudo-random order of 0 .. size-1 that takes no memory: any place of it is computed directly.

A number below side^2 is a pair (left, right) of digits below side. A Feistel network permutes them,

    left, right <- right, (left + hash(right)) mod side        a few times, each with its own key

and where it leads outside the range it is applied again until it is back inside ("cycle walking"),
which makes it a permutation of the range.
Source: J. Black, P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
# Multipliers of the SplitMix64 generator (Steele, Lea, Flood 2014).
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permuted(
    places: npt.NDArray[np.int64], size: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Which number stands at each place of the order of an epoch.

    Args:
        places: Any shape, 0 to size - 1.
        size: Length of the order, at least 1.
        seed: Together with `epoch` chooses the order; at least 0.
        epoch: At least 0.

    Example:
        >>> sorted(permuted(np.arange(5), size=5, seed=0, epoch=0).tolist())
        [0, 1, 2, 3, 4]
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    keys = _keys(seed, epoch)
    numbers = _feistel(places.astype(np.uint64), side, keys)
    while (outside := numbers >= size).any():
        numbers[outside] = _feistel(numbers[outside], side, keys)
    return numbers.astype(np.int64)


@lru_cache(maxsize=8)
def _keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    keys = np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS, np.uint64)
    return keys.astype(np.uint64, copy=False)


def _feistel(
    numbers: npt.NDArray[np.uint64], side: np.uint64, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    left, right = np.divmod(numbers, side)
    for key in keys:
        mixed = (right ^ key) * _MIX_1
        mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX_2
        left, right = right, (left + (mixed >> np.uint64(32))) % side
    joined: npt.NDArray[np.uint64] = left * side + right
    return joined
