from __future__ import annotations

import pytest
import torch

from mambakit.reproduce import Draws, InductionHeads
from mambakit.reproduce.induction_heads import EXPERIMENT


@pytest.mark.parametrize(("vocab_size", "seqlen"), [(16, 256), (16, 3), (3, 64), (2, 5)])
def test_sequences_are_as_the_paper_defines_them(vocab_size, seqlen):
    task = InductionHeads(vocab_size)
    tokens, targets = task.make(Draws(0, 0, torch.arange(4)), 6, seqlen)
    assert tokens.shape == (4, 6, seqlen)
    assert targets.shape == (4, 6, 1)
    assert task.answers == 1
    assert (tokens[..., -1] == vocab_size - 1).all()
    assert ((tokens == vocab_size - 1).sum(-1) == 2).all()
    first = (tokens == vocab_size - 1).int().argmax(-1, keepdim=True)
    assert torch.equal(tokens.gather(-1, first + 1), targets)
    assert tokens.min() >= 0
    assert targets.max() < vocab_size - 1


def test_every_token_and_every_place_is_as_likely():
    tokens, targets = InductionHeads(16).make(Draws(0, 0, torch.arange(100)), 100, 12)
    counts = torch.bincount(targets.flatten(), minlength=15).double() / targets.numel()
    assert len(counts) == 15
    assert (counts * 15 - 1).abs().max() < 0.15
    places = (tokens == 15).double().mean((0, 1))
    assert places[10] == 0
    assert places[11] == 1
    assert (places[:10] * 10 - 1).abs().max() < 0.12


def test_kinds_cover_the_sequence():
    kinds = InductionHeads(4).kinds(torch.tensor([1, 3, 0, 2, 1, 3]))
    assert {name: mask.int().tolist() for name, mask in kinds.items()} == {
        "other": [1, 0, 0, 0, 1, 0],
        "special": [0, 1, 0, 0, 0, 1],
        "to recall": [0, 0, 1, 0, 0, 0],
        "behind it": [0, 0, 0, 1, 0, 0],
    }
    # What comes first follows nothing, and a special token is no other kind.
    kinds = InductionHeads(4).kinds(torch.tensor([3, 1, 3]))
    assert {name: mask.int().tolist() for name, mask in kinds.items()} == {
        "other": [0, 0, 0],
        "special": [1, 0, 1],
        "to recall": [0, 1, 0],
        "behind it": [0, 0, 0],
    }


def test_the_experiment_is_the_papers():
    assert EXPERIMENT.task == InductionHeads(vocab_size=16)
    mamba = EXPERIMENT.contestants["mamba"]
    assert (mamba.model.d_model, mamba.model.n_layer) == (64, 2)
    assert (mamba.recipe.lr, mamba.recipe.steps) == (1e-3, 204_800)
    assert mamba.recipe.test_lengths == tuple(2**n for n in range(6, 21))
    assert set(mamba.paper.values()) == {100.0}
    for name, steps in (("absolute", 204_800), ("rope", 409_600), ("xpos", 409_600)):
        attention = EXPERIMENT.contestants[f"attention-{name}"]
        assert attention.model.positions == name
        assert (attention.recipe.lr, attention.recipe.steps) == (2e-4, steps)
        assert attention.recipe.test_lengths == tuple(2**n for n in range(6, 15))
        assert {n for n, accuracy in attention.paper.items() if accuracy is None} == {
            2**n for n in range(15, 21)
        }
        assert attention.paper[256] == 100.0
    for contestant in EXPERIMENT.contestants.values():
        recipe = contestant.recipe
        assert (recipe.seqlen, recipe.batch_size) == (256, 8)
        assert recipe.test_sequences == 256
