from __future__ import annotations

import torch

from mambakit.generate.randomness import key_of, uniform

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """The published generator, in Python's integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


def test_known_numbers_of_splitmix64():
    assert (
        splitmix64(1234567) == 6457827717110365317
    )  # First output for this seed in other libraries.
    assert [key_of(seed) & MASK for seed in (0, 1, 2**63 - 1)] == [
        splitmix64(seed) for seed in (0, 1, 2**63 - 1)
    ]


def test_numbers_are_those_of_the_generator():
    key, golden = key_of(42), 0x9E3779B97F4A7C15
    positions = torch.tensor([1, 2, 3, 1000, 10**7])
    expected = [
        (splitmix64((key + (p - 1) * golden) & MASK) >> 32) / 2**32 for p in positions.tolist()
    ]
    assert uniform(torch.tensor(key), positions).tolist() == expected


def test_uniform_and_unrelated_between_positions_and_seeds():
    positions = torch.arange(400)
    keys = torch.tensor([key_of(seed) for seed in range(400)])
    drawn = uniform(keys[:, None], positions[None])
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    counts = (drawn * 16).long().flatten().bincount(minlength=16)
    assert ((counts - 10_000).abs() < 5 * 10_000**0.5).all()
    for other in (drawn.roll(1, 0), drawn.roll(1, 1)):
        correlation = torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / 400
