from __future__ import annotations

import pytest
import torch

from mambakit.errors import ArgumentError
from mambakit.generate import SamplingOptions
from mambakit.generate.sampling import penalise, probabilities, sample

INF = float("inf")


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def logits_of(*probs: float) -> torch.Tensor:
    return torch.tensor([probs]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 9}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.8}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"min_p": 0.25}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        # One after the other: top-k leaves 5/9, 2.5/9, 1.5/9, of which 0.8 is the first two.
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 0.5, "min_p": 0.2}, [0.8, 0.2, 0, 0]),
    ],
)
def test_exact_distributions(options, expected):
    probs = probabilities(logits_of(0.5, 0.25, 0.15, 0.1), SamplingOptions(**options))
    torch.testing.assert_close(probs, torch.tensor([expected]).float())


def test_the_order_of_the_ids_does_not_matter():
    options = SamplingOptions(top_k=3, top_p=0.8, min_p=0.3)
    probs = probabilities(logits_of(0.1, 0.25, 0.5, 0.15), options)
    torch.testing.assert_close(probs, torch.tensor([[0, 1 / 3, 2 / 3, 0]]))


def test_min_p_is_relative_to_the_largest_probability_wherever_it_is():
    probs = probabilities(logits_of(0.06, 0.04, 0.9), SamplingOptions(min_p=0.05))
    torch.testing.assert_close(probs, torch.tensor([[0.06, 0, 0.9]]) / 0.96)


def test_ties_stay_together():
    logits = logits_of(0.25, 0.25, 0.25, 0.25)
    even = torch.full((1, 4), 0.25)
    torch.testing.assert_close(probabilities(logits, SamplingOptions(top_k=2)), even)
    torch.testing.assert_close(probabilities(logits, SamplingOptions(top_p=0.3)), even)


def test_top_p_of_a_large_vocabulary_equals_sorting_it_whole():
    logits = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.1], [1.0], [5.0]]  # Nuclei of 11 thousand, some thousand, and a few dozen ids.
    )
    kept = probabilities(logits, SamplingOptions(top_p=0.6)) > 0
    order = logits.argsort(descending=True)
    before = logits.softmax(-1).gather(1, order).double().cumsum(-1).roll(1, dims=1)
    before[:, 0] = 0
    expected = torch.zeros_like(kept).scatter(1, order, before < 0.6)
    assert (kept != expected).sum() <= 2  # the ids at the boundary, by rounding
    assert kept.sum(-1).tolist()[0] > 8192 > 1024 > kept.sum(-1).tolist()[2]


def test_rows_are_independent():
    logits = torch.cat([logits_of(0.5, 0.3, 0.2), logits_of(0.1, 0.1, 0.8)])
    options = SamplingOptions(top_p=0.6)
    both = probabilities(logits, options)
    for row in range(2):
        assert torch.equal(both[row : row + 1], probabilities(logits[row : row + 1], options))


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([[2.0, -2.0, 4.0, -4.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise(logits, 2.0, seen).tolist() == [[1.0, -4.0, 4.0, -4.0]]
    assert penalise(logits, 1.0, seen) is logits
    assert penalise(logits, 2.0, None) is logits
    greedy = SamplingOptions(temperature=0, repetition_penalty=1.5)
    logits = torch.tensor([[3.0, 2.9]])
    assert sample(logits, greedy, [], torch.tensor([[False, False]])).tolist() == [0]
    assert sample(logits, greedy, [], torch.tensor([[True, False]])).tolist() == [1]


def test_greedy_takes_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -INF, 4.0]])
    assert sample(logits, SamplingOptions(temperature=0), []).tolist() == [1, 0]


def test_frequencies_follow_the_distribution():
    logits = logits_of(0.5, 0.25, 0.15, 0.1).expand(20_000, 4)
    [generator] = generators(3)
    tokens = sample(logits, SamplingOptions(), [generator] * 20_000)
    frequencies = tokens.bincount(minlength=4) / 20_000
    # Four standard deviations of the largest.
    assert (frequencies - torch.tensor([0.5, 0.25, 0.15, 0.1])).abs().max() < 4 * 0.5 / 20_000**0.5


def test_what_is_cut_off_is_never_drawn():
    logits = logits_of(0.0, 0.3, 0.0, 0.7, 0.0).expand(5_000, 5)
    [generator] = generators(0)
    tokens = sample(logits, SamplingOptions(), [generator] * 5_000)
    assert set(tokens.tolist()) == {1, 3}
    tokens = sample(logits, SamplingOptions(top_k=1), [generator] * 5_000)
    assert set(tokens.tolist()) == {3}


def test_seeds_reproduce_and_rows_have_their_own():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).expand(2, 50)

    def draw(*seeds: int) -> list[list[int]]:
        sources = generators(*seeds)
        draws = [sample(logits[: len(seeds)], SamplingOptions(), sources) for _ in range(20)]
        return torch.stack(draws, dim=1).tolist()

    assert draw(1, 2) == draw(1, 2)
    assert draw(1, 2) == [*draw(1), *draw(2)]
    assert draw(1) != draw(2)


def test_half_precision_logits():
    logits = logits_of(0.5, 0.25, 0.25).bfloat16()
    assert sample(logits, SamplingOptions(), generators(0)).shape == (1,)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("row", [[1.0, float("nan")], [1.0, INF], [-INF, -INF]])
def test_logits_that_are_not_finite(temperature, row):
    logits = torch.tensor([[1.0, 2.0], row])
    with pytest.raises(ArgumentError, match="logits: got NaN or infinite numbers"):
        sample(logits, SamplingOptions(temperature=temperature), generators(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature: got -0\.1, wanted at least 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_k": 0}, "top_k: got 0, wanted at least 1, or None"),
        ({"top_p": 0}, "top_p: got 0, wanted above 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p: got 1\.1"),
        ({"min_p": -0.1}, r"min_p: got -0\.1, wanted from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: got 0, wanted a number above 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ArgumentError, match=message):
        SamplingOptions(**options)
