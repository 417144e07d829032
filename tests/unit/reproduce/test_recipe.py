from __future__ import annotations

import dataclasses
import json

import pytest

from mambakit.errors import ConfigError
from mambakit.reproduce import Recipe
from mambakit.reproduce.catalogue import EXPERIMENTS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0, not at least 1"),
        ({"batch_size": 0}, "batch_size is 0, not at least 1"),
        ({"test_sequences": 0}, "test_sequences is 0, not at least 1"),
        ({"lr": 0.0}, "lr is 0.0, not between 0 and 10"),
        ({"precision": "half"}, "precision is 'half', not float32 or bfloat16"),
        ({"hold": -1}, "hold is -1, not at least 0"),
        ({"log_every": 5}, "log_every is 5, not a multiple of steps_per_call = 2"),
        ({"validate_every": 6}, "validate_every is 6, not a multiple of log_every = 4"),
        ({"steps": 25}, "steps is 25, not a multiple of log_every = 4"),
        ({"test_lengths": ()}, "test_lengths is (), not a list of lengths"),
    ],
)
def test_a_wrong_field_is_told(recipe: Recipe, fields, message):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(recipe, **fields)
    assert message in str(caught.value)


def test_dict_round_trip_through_json(recipe: Recipe):
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_have_a_quick_form(name):
    quick = EXPERIMENTS[name].made_quick()
    assert quick.task == EXPERIMENTS[name].quick_task
    assert len(quick.contestants) >= 2
    for contestant in quick.contestants.values():
        assert contestant.recipe.steps <= 2000
        assert contestant.paper == {}
