from __future__ import annotations

import pytest
import torch

from mambakit.errors import ArgumentError
from mambakit.generate import SamplingOptions
from mambakit.generate.sampling import (
    Method,
    SamplingRows,
    log_probabilities,
    penalise,
    probabilities,
    sample,
)
from mambakit.ops.likeliest import NOT_FINITE

INF = float("inf")


def rows_of(
    *options: SamplingOptions, vocab_size: int = 4, seeds: tuple[int, ...] = (), position: int = 0
) -> SamplingRows:
    seeds = seeds or (0,) * len(options)
    rows = [
        SamplingRows.of(o, vocab_size, s, position) for o, s in zip(options, seeds, strict=True)
    ]
    return SamplingRows(*map(torch.cat, zip(*rows, strict=True)))


def logits_of(*probs: float) -> torch.Tensor:
    return torch.tensor([probs]).log()


def distribution(logits: torch.Tensor, *options: SamplingOptions) -> torch.Tensor:
    probs = probabilities(logits, rows_of(*options, vocab_size=logits.shape[1]))
    return probs / probs.sum(-1, keepdim=True)


def draws(
    logits: torch.Tensor, options: SamplingOptions, count: int, seed: int = 0
) -> torch.Tensor:
    """Tokens at so many positions."""
    rows = rows_of(options, vocab_size=logits.shape[1], seeds=(seed,))
    integers = rows.integers.repeat(count, 1)
    integers[:, 2] = torch.arange(count)
    rows = SamplingRows(rows.reals.repeat(count, 1), integers)
    return sample(logits.expand(count, -1), rows, Method.of(options))


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
    probs = distribution(logits_of(0.5, 0.25, 0.15, 0.1), SamplingOptions(**options))
    torch.testing.assert_close(probs, torch.tensor([expected]).float())


def test_options_of_several_rows_at_once():
    options = [
        SamplingOptions(top_k=2),
        SamplingOptions(top_p=0.8),
        SamplingOptions(min_p=0.25, temperature=0.9),
        SamplingOptions(temperature=0.5),
        SamplingOptions(temperature=0, top_k=1),
    ]
    logits = torch.randn(5, 50)
    together = distribution(logits, *options)
    for row, own in enumerate(options):
        torch.testing.assert_close(
            together[row : row + 1], distribution(logits[row : row + 1], own)
        )


@pytest.mark.parametrize("vocab_size", [50, 257, 1000, 20_001])
def test_rows_are_independent_bit_for_bit(vocab_size):
    options = [
        SamplingOptions(temperature=0.7),
        SamplingOptions(temperature=1.3, top_p=0.9),
        SamplingOptions(top_k=40, top_p=0.9),
        SamplingOptions(top_k=5000, min_p=0.01),
        SamplingOptions(top_p=0.999, temperature=3),
        SamplingOptions(repetition_penalty=1.7),
        SamplingOptions(temperature=0),
    ]
    padded = torch.randn(len(options), vocab_size + 13) * 3
    logits, seen = padded[:, :vocab_size], torch.rand(len(options), vocab_size) < 0.3
    rows = rows_of(*options, vocab_size=vocab_size, seeds=(*range(len(options)),))
    probs, tokens = probabilities(logits, rows), sample(logits, rows, Method.CUT, seen)
    for i, own in enumerate(options):
        one, alone = slice(i, i + 1), rows.slice(i, i + 1)
        assert torch.equal(probabilities(logits[one].clone(), alone), probs[one])
        assert torch.equal(sample(logits[one], alone, Method.of(own), seen[one]), tokens[one])


def test_the_order_of_the_ids_does_not_matter():
    options = SamplingOptions(top_k=3, top_p=0.8, min_p=0.3)
    probs = distribution(logits_of(0.1, 0.25, 0.5, 0.15), options)
    torch.testing.assert_close(probs, torch.tensor([[0, 1 / 3, 2 / 3, 0]]))


def test_min_p_is_relative_to_the_largest_probability_wherever_it_is():
    probs = distribution(logits_of(0.06, 0.04, 0.9), SamplingOptions(min_p=0.05))
    torch.testing.assert_close(probs, torch.tensor([[0.06, 0, 0.9]]) / 0.96)


def test_ties_stay_together():
    logits = logits_of(0.25, 0.25, 0.25, 0.25)
    even = torch.full((1, 4), 0.25)
    torch.testing.assert_close(distribution(logits, SamplingOptions(top_k=2)), even)
    torch.testing.assert_close(distribution(logits, SamplingOptions(top_p=0.3)), even)


def test_top_p_of_a_large_vocabulary_equals_sorting_it_whole():
    logits = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.1], [1.0], [5.0]]  # Nuclei of 11 thousand, some thousand, and a few dozen ids.
    )
    kept = distribution(logits, *[SamplingOptions(top_p=0.6)] * 3) > 0
    order = logits.argsort(descending=True)
    before = logits.softmax(-1).gather(1, order).double().cumsum(-1).roll(1, dims=1)
    before[:, 0] = 0
    expected = torch.zeros_like(kept).scatter(1, order, before < 0.6)
    assert (kept != expected).sum() <= 2  # the ids at the boundary, by rounding
    assert kept.sum(-1).tolist()[0] > 8192 > 1024 > kept.sum(-1).tolist()[2]


def test_top_k_beyond_the_first_try():
    logits = torch.randn(2, 20_000)
    options = [SamplingOptions(top_k=3000), SamplingOptions(top_k=3000, top_p=0.99)]
    kept = (distribution(logits, *options) > 0).sum(-1).tolist()
    assert kept[0] == 3000
    assert 1024 < kept[1] < 3000


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([[2.0, -2.0, 4.0, -4.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise(logits, torch.tensor([[2.0]]), seen).tolist() == [[1.0, -4.0, 4.0, -4.0]]
    assert penalise(logits, torch.tensor([[1.0]]), seen).tolist() == logits.tolist()
    greedy = SamplingOptions(temperature=0, repetition_penalty=1.5)
    logits, rows = torch.tensor([[3.0, 2.9]]), rows_of(greedy, vocab_size=2)
    assert sample(logits, rows, Method.DRAW).tolist() == [0]
    assert sample(logits, rows, Method.DRAW, torch.tensor([[False, False]])).tolist() == [0]
    assert sample(logits, rows, Method.DRAW, torch.tensor([[True, False]])).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"temperature": 0}, Method.GREEDY),
        ({"temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.1}, Method.GREEDY),
        ({"temperature": 0, "repetition_penalty": 1.1}, Method.DRAW),
        ({}, Method.DRAW),
        ({"min_p": 0.1, "repetition_penalty": 0.9, "temperature": 2}, Method.DRAW),
        ({"top_k": 3}, Method.CUT),
        ({"top_p": 0.9}, Method.CUT),
    ],
)
def test_the_least_method_that_the_options_need(options, method):
    options = SamplingOptions(**options)
    assert Method.of(options) is method
    logits, seen = torch.randn(1, 3000), torch.rand(1, 3000) < 0.2
    for seed in range(20):
        rows = rows_of(options, vocab_size=3000, seeds=(seed,))
        own = sample(logits, rows, method, seen)
        for more in range(method, Method.CUT + 1):
            assert torch.equal(sample(logits, rows, Method(more), seen), own)


def test_greedy_takes_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -INF, 4.0]])
    rows = rows_of(*[SamplingOptions(temperature=0)] * 2, vocab_size=3)
    assert sample(logits, rows, Method.GREEDY).tolist() == [1, 0]


def test_frequencies_follow_the_distribution():
    tokens = draws(logits_of(0.5, 0.25, 0.15, 0.1), SamplingOptions(), 20_000, seed=3)
    frequencies = tokens.bincount(minlength=4) / 20_000
    # Four standard deviations of the largest.
    assert (frequencies - torch.tensor([0.5, 0.25, 0.15, 0.1])).abs().max() < 4 * 0.5 / 20_000**0.5


def test_what_is_cut_off_is_never_drawn():
    logits = logits_of(0.0, 0.3, 0.0, 0.7, 0.0)
    assert set(draws(logits, SamplingOptions(), 5_000).tolist()) == {1, 3}
    assert set(draws(logits, SamplingOptions(top_k=1), 5_000).tolist()) == {3}
    assert set(draws(logits, SamplingOptions(min_p=0.5), 5_000).tolist()) == {3}


def test_seeds_and_positions_reproduce_and_differ():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    first = draws(logits, SamplingOptions(), 20, seed=1)
    assert torch.equal(first, draws(logits, SamplingOptions(), 20, seed=1))
    assert not torch.equal(first, draws(logits, SamplingOptions(), 20, seed=2))
    rows = rows_of(SamplingOptions(), vocab_size=50, seeds=(1,), position=7)
    assert sample(logits, rows, Method.DRAW).tolist() == [first[7]]


def test_half_precision_logits():
    logits = logits_of(0.5, 0.25, 0.25).bfloat16()
    rows = rows_of(SamplingOptions(), vocab_size=3)
    assert torch.equal(sample(logits, rows, Method.DRAW), sample(logits.float(), rows, Method.DRAW))


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 1}])
@pytest.mark.parametrize("row", [[1.0, float("nan")], [1.0, INF], [-INF, -INF]])
def test_logits_that_are_not_finite(options, row):
    options = SamplingOptions(**options)
    rows = rows_of(options, options, vocab_size=2)
    tokens = sample(torch.tensor([[-INF, 2.0], row]), rows, Method.of(options))
    assert tokens.tolist() == [1, NOT_FINITE]


def test_log_probabilities_are_those_of_the_model():
    logits = logits_of(0.1, 0.6, 0.3).add(5).expand(2, 3)
    chosen, values, ids = log_probabilities(logits, torch.tensor([2, NOT_FINITE]), 2)
    torch.testing.assert_close(chosen.exp(), torch.tensor([0.3, 0.1]))
    torch.testing.assert_close(values[0].exp(), torch.tensor([0.6, 0.3]))
    assert ids[0].tolist() == [1, 2]
    assert log_probabilities(logits, torch.tensor([0, 0]), 0)[1].shape == (2, 0)


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
