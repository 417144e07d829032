from __future__ import annotations

import random

import pytest
import torch

from mambakit.errors import ArgumentError
from mambakit.evaluate import likelihood
from mambakit.evaluate.likelihood import Likelihood, log_likelihoods
from mambakit.models import MambaConfig, MambaLanguageModel

VOCAB = 50  # Six ids more are padding.


@pytest.fixture
def model() -> MambaLanguageModel:
    return MambaLanguageModel(MambaConfig(d_model=24, n_layer=2, vocab_size=VOCAB)).eval()


def ids(length: int, seed: int) -> list[int]:
    draws = random.Random(seed)
    return [draws.randrange(VOCAB) for _ in range(length)]


@torch.no_grad()
def directly(model: MambaLanguageModel, context: list[int], continuation: list[int]) -> Likelihood:
    """One row from the beginning, in float64 and with the reference operations."""
    tokens = torch.tensor([context + continuation])
    exact = MambaLanguageModel(model.config).double()
    exact.load_state_dict(model.state_dict())
    logits = exact(tokens[:, :-1])[0][0, len(context) - 1 :]
    targets = torch.tensor(continuation)
    total = logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return Likelihood(total, bool((logits[:, :VOCAB].argmax(-1) == targets).all()))


def check(model: MambaLanguageModel, pairs, batch_size: int = 16) -> dict[int, Likelihood]:
    results = dict(log_likelihoods(model, pairs, batch_size))
    assert sorted(results) == list(range(len(pairs)))
    for index, (context, continuation) in enumerate(pairs):
        wanted = directly(model, context, continuation)
        assert results[index].log_prob == pytest.approx(wanted.log_prob, rel=1e-5), index
        assert results[index].is_greedy is wanted.is_greedy, index
    return results


LONG, OTHER, SHORT = ids(60, 1), ids(60, 2), ids(7, 3)
PAIRS = {
    "one": [(LONG, ids(4, 4))],
    "one token": [(LONG, [3])],
    "after one token": [([0], ids(5, 5))],
    "endings of a context": [(LONG, ids(n, 6 + n)) for n in (5, 1, 9, 3)],
    "endings of a short context": [(SHORT, ids(n, 6 + n)) for n in (5, 1, 9)],
    "endings of one token": [([0], ids(n, 6 + n)) for n in (5, 1)],
    "choices": [(LONG, [letter]) for letter in (1, 2, 3, 4)],
    "last token differs": [(LONG, [5, 6, 7]), (LONG, [5, 6, 8]), (LONG, [5, 9])],
    "the same twice": [(LONG, [5, 6]), (LONG, [5, 6])],
    "the same tokens, cut elsewhere": [(LONG, [5, 6, 7]), ([*LONG, 5], [6, 7])],
    "contexts of equal length": [(c, ids(n, n)) for c in (LONG, OTHER) for n in (8, 4, 2)],
    "contexts of other lengths": [(LONG[:n], ids(n % 5 + 1, n)) for n in (40, 1, 60, 17, 40, 2)],
}


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
def test_it_is_what_one_row_alone_gives(model, pairs):
    check(model, pairs)


def test_in_any_batch_the_result_is_the_same_bit_for_bit(model):
    pairs = [pair for some in PAIRS.values() for pair in some]
    one, sixteen = (check(model, pairs, batch_size) for batch_size in (1, 16))
    assert one == sixteen
    for context, _ in pairs:  # Nor do other contexts matter.
        own = [index for index, pair in enumerate(pairs) if pair[0] == context]
        alone = dict(log_likelihoods(model, [pairs[index] for index in own]))
        assert [one[index] for index in own] == [alone[n] for n in range(len(own))]


@pytest.mark.parametrize(("batch_size", "most"), [(1, 1), (3, 3), (16, 12)])
def test_batches_of_contexts_and_continuations(model, batch_size, most, monkeypatch):
    """As on a GPU: contexts of equal length together, rows of several contexts together."""
    monkeypatch.setattr(likelihood, "_at_once", lambda device, size: (size, size))
    pairs = [pair for some in PAIRS.values() for pair in some]
    calls = count_positions(model, monkeypatch)
    check(model, pairs, batch_size)
    assert max(rows for rows, _ in calls) == most


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_of_long_rows(model, chunk, monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK", chunk)
    monkeypatch.setattr(likelihood, "HEAD_TOKENS", 5)
    pairs = [(LONG + OTHER, ids(90, 9)), (LONG + OTHER, ids(20, 10)), (SHORT, ids(64, 11))]
    check(model, pairs)


def count_positions(model, monkeypatch) -> list[tuple[int, int]]:
    """Rows and length of each call of the model."""
    calls = []
    hidden = model.hidden

    def counted(tokens, *rest, **named):
        calls.append(tuple(tokens.shape))
        return hidden(tokens, *rest, **named)

    monkeypatch.setattr(model, "hidden", counted)
    return calls


def test_a_context_is_read_once(model, monkeypatch):
    calls = count_positions(model, monkeypatch)
    dict(log_likelihoods(model, [(LONG, ids(4, n)) for n in range(4)]))
    assert calls == [(1, 59), (4, 4)]


def test_choices_of_one_token_are_one_row(model, monkeypatch):
    calls = count_positions(model, monkeypatch)
    dict(log_likelihoods(model, [(LONG, [letter]) for letter in range(4)]))
    assert calls == [(1, 60)]


def test_a_short_context_is_read_with_its_continuations(model, monkeypatch):
    calls = count_positions(model, monkeypatch)
    dict(log_likelihoods(model, [(SHORT, ids(3, 1)), (SHORT, ids(4, 2))]))
    assert calls == [(2, 10)]


def test_the_likeliest_continuation_is_greedy(model):
    [written] = model.generate([LONG], max_tokens=6, temperature=0)
    other = [*written[:-1], (written[-1] + 1) % VOCAB]
    results = check(model, [(LONG, written), (LONG, other), (LONG, written[:3])])
    assert [results[n].is_greedy for n in range(3)] == [True, False, True]


def test_a_padding_id_is_never_the_likeliest(model):
    with torch.no_grad():
        hidden, _ = model.hidden(torch.tensor([LONG]))
        model.lm_head.weight[VOCAB] = 100 * hidden[0, -1]
    token = model.generate([LONG], max_tokens=1, temperature=0)[0][0]
    results = dict(log_likelihoods(model, [(LONG, [token])]))
    assert results[0].is_greedy
    assert results[0].log_prob < -10  # But its probability is what the softmax gives.


def test_an_empty_continuation_is_certain(model):
    results = dict(log_likelihoods(model, [(LONG, []), (LONG, [1])]))
    assert results[0] == Likelihood(0.0, True)
    assert results[1].log_prob < 0
    assert list(log_likelihoods(model, [])) == []


def test_longest_first(model):
    order = [index for index, _ in log_likelihoods(model, [([0] * n, [1]) for n in (3, 50, 20)])]
    assert order == [1, 2, 0]


@pytest.mark.parametrize(
    ("pairs", "batch_size", "message"),
    [
        ([([1], [2]), ([], [1])], 16, r"pairs\[1\]: got an empty context"),
        ([([1], [2])], 0, "batch_size: got 0, wanted at least 1"),
        ([([1, VOCAB], [2])], 16, "got id 50"),
        ([([1], [3, VOCAB + 9])], 16, r"pairs\[0\]: got id 59, wanted 0 <= id < 50"),
        ([([1], [-1])], 16, r"pairs\[0\]: got id -1"),
    ],
)
def test_wrong_arguments(model, pairs, batch_size, message):
    with pytest.raises(ArgumentError, match=message):
        list(log_likelihoods(model, pairs, batch_size))
