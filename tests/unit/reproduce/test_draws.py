from __future__ import annotations

import pytest
import torch

from mambakit.reproduce.draws import Draws, _mix, _mix_integer

OUTPUTS = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
"""Of the reference implementation of SplitMix64 with the seed 1234567."""
INCREMENT = 0x9E3779B97F4A7C15


def states() -> list[int]:
    return [(1234567 + (i + 1) * INCREMENT) % 2**64 for i in range(5)]


def test_numbers_are_those_of_splitmix64():
    assert [_mix_integer(state) for state in states()] == OUTPUTS
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states()])
    assert _mix(signed).tolist() == [output % 2**63 for output in OUTPUTS]


def test_a_step_has_its_numbers_however_many_are_drawn_at_once():
    def draw(steps):
        draws = Draws(3, 1, torch.tensor(steps))
        return draws.integers(1000, 5), draws.bits(2, 3)

    for whole, part in zip(draw([0, 1, 2, 3, 2**40]), draw([2, 2**40]), strict=True):
        assert torch.equal(whole[[2, 4]], part)


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "stream", "draw"])
def test_seeds_streams_and_draws_are_independent(other):
    def draw(seed, stream, before):
        draws = Draws(seed, stream, torch.arange(1))
        for _ in range(before):
            draws.bits(1)
        return draws.integers(2**31, 1000)

    one, two = draw(0, 0, 0), draw(*other)
    assert (one == two).sum() == 0
    correlation = torch.corrcoef(torch.stack([one, two]).flatten(1).double())[0, 1]
    assert abs(correlation) < 0.1


@pytest.mark.parametrize("high", [2, 3, 14, 15, 254])
def test_integers_are_uniform(high):
    numbers = Draws(0, 0, torch.arange(8)).integers(high, 25, 50 * high)
    assert numbers.shape == (8, 25, 50 * high)
    counts = torch.bincount(numbers.flatten(), minlength=high).double()
    assert len(counts) == high
    expected = numbers.numel() / high
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    # Its mean is high - 1, its deviation sqrt(2 (high - 1)).
    assert abs(chi_squared - (high - 1)) < 5 * (2 * (high - 1)) ** 0.5


def test_one_integer_is_zero_and_the_largest_range_is_reached():
    draws = Draws(0, 0, torch.arange(3))
    assert draws.integers(1, 4).tolist() == [[0] * 4] * 3
    numbers = draws.integers(2**31, 10000)
    assert numbers.min() < 2**31 * 1e-3
    assert 2**31 * 0.999 < numbers.max() < 2**31
