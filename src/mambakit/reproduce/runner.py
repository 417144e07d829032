"""Runs an experiment: trains and tests its models one after another, and goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mambakit.errors import ArgumentError, CheckpointError, ConfigError
from mambakit.reproduce import pictures, results
from mambakit.reproduce.evaluation import TEST, Score, score_sequences
from mambakit.reproduce.experiment import Contestant, Experiment
from mambakit.reproduce.models import build
from mambakit.reproduce.provenance import provenance
from mambakit.reproduce.training import CHECKPOINT, Training, read_checkpoint
from mambakit.train.config import read_toml, write_tables

RECIPE = "recipe.toml"

Tell = Callable[[str], None]
"""Takes one line about how far the run is."""


def reproduce(
    experiment: Experiment,
    out: Path,
    device: torch.device,
    models: Sequence[str] = (),
    *,
    stop: Callable[[], bool] = lambda: False,
    tell: Tell = lambda line: None,
) -> bool:
    """Train and test the models of an experiment, or go on with that; write results, table and plot.

    In `out` each model has a folder with recipe.toml, checkpoint.pt, result.json and, if its dt depends on the input, a
    picture of it; beside them lie results.json, table.md and accuracy.png with what there is.

    Args:
        experiment: The experiment.
        out: Folder of the results.
        device: Where to train and test.
        models: Names of the models to run. Default: all.
        stop: Asked between parts of a second or so; once it says yes, all is saved and the run ends.
        tell: Told how far the run is.

    Returns:
        Whether everything is done; if not, the same call goes on.

    Raises:
        ArgumentError: A model is not one of the experiment.
        ConfigError: The folder holds a run with another recipe.
        TrainingError: A loss is not finite.
    """
    chosen = _choose(experiment, models)
    for name, contestant in chosen.items():
        _record_recipe(contestant, out / name / RECIPE)
    are_done = []
    for name, contestant in chosen.items():
        if not stop():
            are_done.append(_Run(experiment, name, contestant, out / name, device).go(stop, tell))
    _summarise(experiment, out)
    return len(are_done) == len(chosen) and all(are_done)


def draw(
    experiment: Experiment, out: Path, device: torch.device, models: Sequence[str] = ()
) -> list[Path]:
    """Draw dt over a sequence again, from the checkpoints in `out`; gives the pictures.

    Args:
        experiment: The experiment that was run.
        out: Its folder.
        device: Where the models run.
        models: Names of the models. Default: all that have a checkpoint and whose dt depends on the input.

    Raises:
        CheckpointError: A model that was named has no checkpoint, or it is damaged.
        ArgumentError: A model is not one of the experiment, or has a dt that does not depend on the input.
    """
    drawn = []
    for name, contestant in _choose(experiment, models).items():
        path = out / name / CHECKPOINT
        if not models and not path.exists():
            continue
        model = build(contestant.model, contestant.recipe.seed).to(device)
        if pictures.has_steps(model):
            model.load_state_dict(read_checkpoint(path, device)["model"])
            drawn.append(out / name / pictures.STEPS)
            pictures.draw_steps(model, experiment.task, contestant.recipe, drawn[-1])
        elif models:
            raise ArgumentError(f"models: the dt of {name!r} does not depend on the input")
    if not drawn:
        raise CheckpointError(f"{out} has no checkpoint of {experiment.name} to draw; train first")
    return drawn


def _choose(experiment: Experiment, models: Sequence[str]) -> dict[str, Contestant]:
    for name in models:
        if name not in experiment.contestants:
            known = ", ".join(experiment.contestants)
            raise ArgumentError(f"models: got {name!r}, but {experiment.name} has: {known}")
    return {n: c for n, c in experiment.contestants.items() if not models or n in models}


class _Run:
    """One model, trained and then tested."""

    def __init__(
        self,
        experiment: Experiment,
        name: str,
        contestant: Contestant,
        folder: Path,
        device: torch.device,
    ) -> None:
        self._task, self._name, self._contestant = experiment.task, name, contestant
        self._folder, self._device = folder, device
        self._training = Training(experiment.task, contestant, folder, device)
        nothing: dict[str, Any] = {"test": {}, "test_seconds": 0.0}
        earlier = results.read_results(experiment, folder.parent).get(name, nothing)
        if not self._training.is_done:
            earlier = nothing  # Of a checkpoint that was removed.
        fields = [field.name for field in dataclasses.fields(Score)]
        self._scores = {
            int(n): Score(**{k: score[k] for k in fields}) for n, score in earlier["test"].items()
        }
        self._test_seconds: float = earlier["test_seconds"]

    def go(self, stop: Callable[[], bool], tell: Tell) -> bool:
        """Train and test until the end or until told to stop; gives whether it is the end."""
        training, recipe = self._training, self._contestant.recipe
        picture = self._folder / pictures.STEPS
        while not training.is_done and not stop():
            training.go_on()
            tell(f"{self._name}: {self._progress()}")
        training.save()
        is_tested = training.is_done and self._test(stop, tell)
        self._save()
        if training.is_done and pictures.has_steps(training.model) and not picture.exists():
            pictures.draw_steps(training.model, self._task, recipe, picture)
        return is_tested

    def _test(self, stop: Callable[[], bool], tell: Tell) -> bool:
        recipe = self._contestant.recipe
        for seqlen in recipe.test_lengths:
            score = self._scores.setdefault(seqlen, Score())
            start = time.perf_counter()
            parts = score_sequences(self._training.model, self._task, recipe, seqlen, TEST, score)
            for _ in parts:
                self._test_seconds += time.perf_counter() - start
                done = f"{score.accuracy:.1f} %" if score.error is None else score.error
                count = score.sequences
                tell(f"{self._name}: test at length {seqlen}: {done} of {count} sequences")
                if stop():
                    return False
                start = time.perf_counter()
        return True

    def _is_whole(self, seqlen: int) -> bool:
        score = self._scores.get(seqlen, Score())
        return score.error is not None or score.sequences == self._contestant.recipe.test_sequences

    def _progress(self) -> str:
        training = self._training
        rate = training.steps_per_second
        assert rate is not None  # A reading is behind us.
        left = (training.recipe.steps - training.step) / rate / 60
        last = (
            f", validation {training.history[-1]['accuracy_percent']:.1f} %"
            if training.history
            else ""
        )
        return (
            f"step {training.step:,} of {training.recipe.steps:,}, loss {training.loss:.4f}{last}, "
            f"{rate:,.0f} steps/s, at most {left:.1f} min left"
        )

    def _save(self) -> None:
        training = self._training
        result: dict[str, Any] = {
            **provenance(self._device),
            **self._contestant.to_dict(),
            "seed": training.recipe.seed,
            "parameters": training.model.num_parameters(),
            "step": training.step,
            "stopped_early": training.stopped_early,
            "training_seconds": training.seconds,
            "steps_per_second": training.steps_per_second,
            "test_seconds": self._test_seconds,
            "history": training.history,
            "test": {str(n): self._describe(n) for n in sorted(self._scores)},
        }
        results.write_json(self._folder / results.RESULT, result)

    def _describe(self, seqlen: int) -> dict[str, Any]:
        score = self._scores[seqlen]
        accuracy = score.accuracy if score.answers else None
        values = {"accuracy_percent": accuracy, "is_whole": self._is_whole(seqlen)}
        return {**values, **dataclasses.asdict(score)}


def _record_recipe(contestant: Contestant, path: Path) -> None:
    """Write the recipe down, or see that the one there is the same."""
    if path.exists():
        recorded = read_toml(path)
        for table, values in contestant.to_dict().items():
            for key, value in values.items():
                if (before := recorded.get(table, {}).get(key)) != value:
                    raise ConfigError(
                        f"{path} has {key} = {before!r}, but this run has {value!r}; "
                        f"give another folder, or remove {path.parent} to start afresh"
                    )
    else:
        write_tables(contestant.to_dict(), path)


def _summarise(experiment: Experiment, out: Path) -> None:
    """Write what there is of all models, also of those that ran earlier."""
    found = results.read_results(experiment, out)
    if not found:
        return
    rows = results.table(experiment, found)
    summary = {"experiment": experiment.name, "source": experiment.source, "models": found}
    results.write_json(out / results.RESULTS, summary)
    results.write_text(out / results.TABLE, results.markdown(rows))
    pictures.draw_accuracy(experiment, found, out / pictures.ACCURACY)
