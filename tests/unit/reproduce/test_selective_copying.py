from __future__ import annotations

import pytest
import torch

from mambakit.reproduce import Draws, SelectiveCopying
from mambakit.reproduce.selective_copying import EXPERIMENT


def make(task: SelectiveCopying, steps: int, batch: int, seqlen: int):
    return task.make(Draws(0, 0, torch.arange(steps)), batch, seqlen)


@pytest.mark.parametrize(
    ("vocab_size", "memorize", "seqlen"), [(16, 16, 4096), (16, 16, 1), (3, 1, 7), (8, 4, 0)]
)
def test_sequences_are_as_the_paper_defines_them(vocab_size, memorize, seqlen):
    task = SelectiveCopying(vocab_size, memorize)
    tokens, targets = make(task, 3, 5, seqlen)
    assert tokens.shape == (3, 5, seqlen + 2 * memorize)
    assert targets.shape == (3, 5, memorize)
    assert task.answers == memorize
    body, markers = tokens[..., : seqlen + memorize], tokens[..., seqlen + memorize :]
    assert (markers == vocab_size - 1).all()
    assert (body < vocab_size - 1).all()
    data = body[body != 0].view(3, 5, memorize)  # fails if a place was used twice
    assert torch.equal(data, targets)
    assert data.min() >= 1
    assert data.max() <= vocab_size - 2


def test_every_token_and_every_place_is_as_likely():
    tokens, targets = make(SelectiveCopying(16, 4), 40, 100, 16)
    counts = torch.bincount(targets.flatten(), minlength=15)[1:].double() / targets.numel()
    assert len(counts) == 14
    assert (counts * 14 - 1).abs().max() < 0.1
    places = (tokens[..., :20] != 0).double().mean((0, 1))
    assert (places / 0.2 - 1).abs().max() < 0.15


def test_kinds_cover_the_sequence():
    task = SelectiveCopying(8, 2)
    kinds = task.kinds(torch.tensor([0, 3, 0, 6, 7, 7]))
    assert {name: mask.int().tolist() for name, mask in kinds.items()} == {
        "noise": [1, 0, 1, 0, 0, 0],
        "data": [0, 1, 0, 1, 0, 0],
        "marker": [0, 0, 0, 0, 1, 1],
    }


def test_the_experiment_is_the_papers():
    assert EXPERIMENT.task == SelectiveCopying(vocab_size=16, memorize=16)
    assert len(EXPERIMENT.contestants) == 9
    for contestant in EXPERIMENT.contestants.values():
        recipe, model = contestant.recipe, contestant.model
        assert (recipe.seqlen, recipe.batch_size, recipe.lr) == (4096, 64, 1e-4)
        assert recipe.steps == 400_000
        assert (model.d_model, model.n_layer, model.vocab_size) == (64, 2, 16)
    models = {name: c.model for name, c in EXPERIMENT.contestants.items()}
    assert models["mamba-s6"].selective == ("dt", "B", "C")
    assert models["mamba-s4d-real"].selective == models["h3-s4d-complex"].selective == ()
    assert models["ungated-s4d-complex"].is_complex
    assert models["h3-s6"].block == "h3"
    assert EXPERIMENT.contestants["mamba-s6"].paper == {4096: 99.8}
    assert EXPERIMENT.contestants["mamba-s4d-real"].paper == {}
