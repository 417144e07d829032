from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from mambakit.errors import CheckpointError, TrainingError
from mambakit.reproduce import Contestant, Experiment
from mambakit.reproduce import training as training_module
from mambakit.reproduce.training import CHECKPOINT, Training

CPU = torch.device("cpu")
MODELS = ["mamba", "attention"]


def changed(contestant: Contestant, **fields) -> Contestant:
    return dataclasses.replace(contestant, recipe=dataclasses.replace(contestant.recipe, **fields))


def finish(training: Training) -> Training:
    while not training.is_done:
        training.go_on()
    return training


def assert_same(one: Training, two: Training) -> None:
    for (name, a), b in zip(
        one.model.state_dict().items(), two.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert one.history == two.history
    assert (one.step, one.loss, one.held) == (two.step, two.loss, two.held)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stops", [(1,), (2,), (1, 2, 3), (5,)])
def test_a_run_goes_on_bit_for_bit(tiny: Experiment, tmp_path: Path, name, stops):
    contestant = tiny.contestants[name]
    whole = finish(Training(tiny.task, contestant, tmp_path / "whole", CPU))
    assert whole.step == 24
    assert [record["step"] for record in whole.history] == [8, 16, 24]
    for readings in stops:
        part = Training(tiny.task, contestant, tmp_path / "parts", CPU)
        for _ in range(readings):
            part.go_on()
            if part.is_done:
                break
        part.save()
    assert_same(finish(Training(tiny.task, contestant, tmp_path / "parts", CPU)), whole)


def test_a_kill_goes_on_from_the_last_validation(tiny: Experiment, tmp_path: Path):
    contestant = tiny.contestants["mamba"]
    killed = Training(tiny.task, contestant, tmp_path, CPU)
    for _ in range(3):
        killed.go_on()  # To step 12; step 8 is saved.
    again = Training(tiny.task, contestant, tmp_path, CPU)
    assert again.step == 8
    whole = finish(Training(tiny.task, contestant, tmp_path / "whole", CPU))
    assert_same(finish(again), whole)


def test_the_steps_of_a_call_are_the_same_steps(tiny: Experiment, tmp_path: Path):
    contestant = tiny.contestants["mamba"]
    one = Training(tiny.task, changed(contestant, steps_per_call=1), tmp_path / "one", CPU)
    four = Training(tiny.task, changed(contestant, steps_per_call=4), tmp_path / "four", CPU)
    assert_same(finish(one), finish(four))


def test_seeds_differ(tiny: Experiment, tmp_path: Path):
    contestant = tiny.contestants["mamba"]
    one = Training(tiny.task, contestant, tmp_path / "one", CPU)
    two = Training(tiny.task, changed(contestant, seed=4), tmp_path / "two", CPU)
    assert not torch.equal(one.model.lm_head.weight, two.model.lm_head.weight)


def test_it_learns(tiny: Experiment, tmp_path: Path):
    contestant = changed(
        tiny.contestants["mamba"], batch_size=32, steps=400, validate_every=400, validation_sequences=100,
        validation_lengths=(6,),
    )  # fmt: skip
    training = finish(Training(tiny.task, contestant, tmp_path, CPU))
    assert training.history[-1]["accuracy_percent"] > 90
    assert training.loss < 0.5 * math.log(3)


@pytest.mark.parametrize(("hold", "steps"), [(0, 24), (1, 8), (2, 16), (4, 24)])
def test_it_ends_when_the_target_has_held(tiny: Experiment, tmp_path: Path, hold, steps):
    contestant = changed(tiny.contestants["mamba"], hold=hold, target=0.0)
    training = finish(Training(tiny.task, contestant, tmp_path, CPU))
    assert training.step == steps
    assert training.stopped_early == (0 < hold < 4)
    assert Training(tiny.task, contestant, tmp_path, CPU).is_done


def test_a_target_out_of_reach_does_not_end_it(tiny: Experiment, tmp_path: Path):
    contestant = changed(tiny.contestants["mamba"], hold=1, target=100.1)
    training = finish(Training(tiny.task, contestant, tmp_path, CPU))
    assert (training.step, training.held, training.stopped_early) == (24, 0, False)


def test_a_loss_that_is_not_finite_stops_it(tiny: Experiment, tmp_path: Path):
    training = Training(tiny.task, tiny.contestants["mamba"], tmp_path, CPU)
    with torch.no_grad():
        training.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="step 4: the loss is nan"):
        training.go_on()


def test_a_damaged_checkpoint_is_told(tiny: Experiment, tmp_path: Path):
    (tmp_path / CHECKPOINT).write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="damaged .* remove it to train the model again"):
        Training(tiny.task, tiny.contestants["mamba"], tmp_path, CPU)


def test_the_pace_leaves_out_what_a_process_begins_with(tiny: Experiment, tmp_path, monkeypatch):
    clock = iter(
        [0.0, 10.0, 20.0, 21.0, 30.0, 33.0, 0.0, 50.0, 60.0, 64.0]
    )  # Begin and end of each reading.
    monkeypatch.setattr(training_module.time, "perf_counter", lambda: next(clock))
    contestant = tiny.contestants["mamba"]
    first = Training(tiny.task, contestant, tmp_path, CPU)
    assert first.steps_per_second is None
    first.go_on()
    assert first.steps_per_second == 4 / 10  # There is nothing better yet.
    first.go_on()
    first.go_on()
    first.save()
    assert first.steps_per_second == 8 / 4
    again = Training(tiny.task, contestant, tmp_path, CPU)
    assert again.steps_per_second == 8 / 4
    again.go_on()
    assert again.steps_per_second == 8 / 4
    again.go_on()
    assert again.steps_per_second == 12 / 8
    assert again.seconds == 10 + 4 + 50 + 4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_training_and_validation_have_the_precision(
    tiny: Experiment, tmp_path: Path, name, precision, dtype
):
    contestant = changed(tiny.contestants[name], precision=precision)
    training = Training(tiny.task, contestant, tmp_path, CPU)
    seen = set()
    training.model.lm_head.register_forward_hook(
        lambda _, __, out: seen.add((training.model.training, torch.is_grad_enabled(), out.dtype))
    )
    finish(training)
    assert seen == {(True, True, dtype), (True, False, dtype)}  # Steps and validations.
    assert {p.dtype for p in training.model.parameters()} == {torch.float32}
    plain = finish(Training(tiny.task, tiny.contestants[name], tmp_path / "plain", CPU))
    assert training.loss == pytest.approx(plain.loss, rel=0.02)
    assert (training.loss == plain.loss) == (precision == "float32")
