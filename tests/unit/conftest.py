from __future__ import annotations

import dataclasses

import pytest

from mambakit.models.config import MambaConfig
from mambakit.reproduce import Contestant, Experiment, InductionHeads, Recipe
from mambakit.reproduce.attention import AttentionConfig

RECIPE = Recipe(
    seqlen=6, batch_size=3, lr=1e-2, steps=24, steps_per_call=2, log_every=4, validate_every=8,
    validation_lengths=(6, 9), validation_sequences=5, target=100.0, hold=0, test_lengths=(5, 12),
    test_sequences=7, seed=3,
)  # fmt: skip


@pytest.fixture
def recipe() -> Recipe:
    return RECIPE


@pytest.fixture
def tiny() -> Experiment:
    """An experiment of a second: a selective Mamba, one that is not, and attention."""
    shape = MambaConfig(d_model=8, n_layer=2, d_state=2, vocab_size=4, tie_embeddings=False)
    contestants = {
        "mamba": Contestant(title="Mamba", model=shape, recipe=RECIPE, paper={5: 99.8, 12: 50.0}),
        "constant": Contestant(
            title="constant", model=dataclasses.replace(shape, selective=()), recipe=RECIPE
        ),
        "attention": Contestant(
            title="attention",
            model=AttentionConfig(d_model=8, n_head=2, vocab_size=4),
            recipe=dataclasses.replace(RECIPE, test_lengths=(5,)),
            paper={5: 12.5},
        ),
    }
    return Experiment(
        name="tiny", title="A tiny experiment", source="none", task=InductionHeads(4),
        contestants=contestants, quick_task=InductionHeads(3), quick=contestants,
    )  # fmt: skip


@pytest.fixture
def quick_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the list of all packages that it adds to its results, for seconds each time."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
