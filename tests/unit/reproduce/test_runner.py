from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mambakit.errors import ArgumentError, CheckpointError, ConfigError
from mambakit.reproduce import Contestant, Experiment, Recipe, reproduce
from mambakit.reproduce.pictures import draw_accuracy
from mambakit.reproduce.results import read_results, table
from mambakit.reproduce.runner import draw
from mambakit.train.config import read_toml

CPU = torch.device("cpu")
PNG = b"\x89PNG"


@pytest.fixture
def done(tiny: Experiment, tmp_path: Path) -> Path:
    assert reproduce(tiny, tmp_path / "done", CPU)
    return tmp_path / "done"


def after(calls: int) -> Callable[[], bool]:
    """A stop that is asked `calls` times in vain."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


def without_times(results: dict) -> dict:
    times = ("training_seconds", "steps_per_second", "test_seconds")
    return {n: {k: v for k, v in r.items() if k not in times} for n, r in results.items()}


def test_files(tiny: Experiment, done: Path):
    assert sorted(path.relative_to(done).as_posix() for path in done.rglob("*")) == sorted(
        ["accuracy.png", "results.json", "table.md"]
        + [name for model in tiny.contestants for name in (
            model, f"{model}/checkpoint.pt", f"{model}/recipe.toml", f"{model}/result.json",
        )]
        + ["mamba/dt.png"]
    )  # fmt: skip
    assert (done / "accuracy.png").read_bytes()[:4] == PNG
    assert (done / "mamba/dt.png").read_bytes()[:4] == PNG


def test_a_result_says_all_that_it_depends_on(tiny: Experiment, done: Path):
    summary = json.loads((done / "results.json").read_text(encoding="utf-8"))
    assert (summary["experiment"], summary["source"]) == ("tiny", "none")
    assert list(summary["models"]) == list(tiny.contestants)
    result = summary["models"]["mamba"]
    recipe = tiny.contestants["mamba"].recipe
    assert result == json.loads((done / "mamba/result.json").read_text(encoding="utf-8"))
    assert Recipe(**result["recipe"]) == recipe
    assert result["model"] == tiny.contestants["mamba"].model.to_dict()
    assert (result["seed"], result["step"], result["stopped_early"]) == (3, 24, False)
    assert result["parameters"] == tiny.contestants["mamba"].model.num_parameters()
    assert 0 < result["steps_per_second"] < math.inf
    assert result["test_seconds"] > 0
    assert {"date", "commit", "device", "mambakit", "torch", "python"} <= set(result)
    assert [record["step"] for record in result["history"]] == [8, 16, 24]
    assert list(result["test"]) == ["5", "12"]
    score = result["test"]["5"]
    assert (score["sequences"], score["answers"], score["is_whole"]) == (7, 7, True)
    assert score["accuracy_percent"] == pytest.approx(100 * score["correct"] / 7)


def test_the_recipe_is_recorded(tiny: Experiment, done: Path):
    assert read_toml(done / "attention/recipe.toml") == tiny.contestants["attention"].to_dict()


def test_the_table_stands_beside_the_papers(tiny: Experiment, done: Path):
    results = read_results(tiny, done)
    accuracy = {
        name: [f"{s['accuracy_percent']:.1f}" for s in r["test"].values()]
        for name, r in results.items()
    }
    rows = table(tiny, results)
    parameters = [f"{results[name]['parameters']:,}" for name in tiny.contestants]
    assert rows == [
        ["model", "parameters", "steps", "5", "12"],
        ["Mamba", parameters[0], "24", *accuracy["mamba"]],
        ["Mamba: paper", "", "", "99.8", "50.0"],
        ["constant", parameters[1], "24", *accuracy["constant"]],
        ["attention", parameters[2], "24", *accuracy["attention"], "-"],
        ["attention: paper", "", "", "12.5", "-"],
    ]
    lines = (done / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| model | parameters | steps | 5 | 12 |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert lines[3] == "| Mamba: paper |  |  | 99.8 | 50.0 |"


def test_the_table_of_what_is_not_whole(tiny: Experiment):
    score = {"correct": 1, "answers": 2, "sequences": 2, "accuracy_percent": 50.0}
    unfinished = {**score, "error": None, "is_whole": False}
    failed = {**score, "error": "out of memory", "is_whole": True}
    result = {"parameters": 1234, "step": 5000, "stopped_early": True, "history": []}
    rows = table(tiny, {"mamba": {**result, "test": {"5": unfinished, "12": failed}}})
    assert rows[1] == ["Mamba", "1,234", "5,000 (early)", "…", "out of memory"]
    validated = {**result, "test": {}, "history": [{"accuracy_percent": 41.06}]}
    assert table(tiny, {"constant": {**result, "test": {}}})[2][3:] == ["…", "…"]
    constant = tiny.contestants["constant"]
    for lengths, cells in (((5,), ["41.1 (validation)", "…"]), ((5, 12), ["…", "…"])):
        recipe = dataclasses.replace(constant.recipe, validation_lengths=lengths)
        changed = {"constant": dataclasses.replace(constant, recipe=recipe)}
        experiment = dataclasses.replace(tiny, contestants=changed)
        assert table(experiment, {"constant": validated})[1][3:] == cells


def test_where_the_paper_ran_out_of_memory(tiny: Experiment, done: Path, tmp_path: Path):
    attention = dataclasses.replace(tiny.contestants["attention"], paper={5: 12.5, 12: None})
    tiny = dataclasses.replace(tiny, contestants={**tiny.contestants, "attention": attention})
    assert table(tiny, {})[-1] == ["attention: paper", "", "", "12.5", "out of memory"]
    draw_accuracy(tiny, read_results(tiny, done), tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == PNG


def test_it_goes_on_where_it_was_stopped(tiny: Experiment, done: Path, tmp_path: Path):
    small = {
        name: dataclasses.replace(c, recipe=dataclasses.replace(c.recipe, tokens_at_once=20))
        for name, c in tiny.contestants.items()
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert reproduce(dataclasses.replace(tiny, contestants=small), whole, CPU)
    runs = 0
    while not reproduce(dataclasses.replace(tiny, contestants=small), parts, CPU, stop=after(7)):
        runs += 1
    assert runs >= 3
    assert without_times(read_results(tiny, parts)) == without_times(read_results(tiny, whole))
    # What is done is not done again.
    assert reproduce(dataclasses.replace(tiny, contestants=small), parts, CPU, stop=after(100))
    same = {n: r["test"] for n, r in read_results(tiny, done).items()}
    assert same == {n: r["test"] for n, r in read_results(tiny, parts).items()}


def test_only_the_models_that_are_named(tiny: Experiment, tmp_path: Path):
    lines: list[str] = []
    assert reproduce(tiny, tmp_path, CPU, ["constant"], tell=lines.append)
    assert list(read_results(tiny, tmp_path)) == ["constant"]
    assert lines[0].startswith("constant: step 4 of 24, loss ")
    assert lines[-1].startswith("constant: test at length 12: ")
    assert reproduce(tiny, tmp_path, CPU, ["mamba"])
    assert list(read_results(tiny, tmp_path)) == ["mamba", "constant"]


def test_a_model_that_is_not_there(tiny: Experiment, tmp_path: Path):
    with pytest.raises(ArgumentError, match="got 'lstm', but tiny has: mamba, constant, attention"):
        reproduce(tiny, tmp_path, CPU, ["mamba", "lstm"])


@pytest.mark.parametrize(("key", "value"), [("lr", 0.5), ("seqlen", 7), ("test_lengths", (5,))])
def test_another_recipe_does_not_go_on(tiny: Experiment, done: Path, key, value):
    def change(contestant: Contestant) -> Contestant:
        recipe = dataclasses.replace(contestant.recipe, **{key: value})
        return dataclasses.replace(contestant, recipe=recipe)

    other = {"mamba": change(tiny.contestants["mamba"])}
    with pytest.raises(ConfigError, match=f"has {key} = .*give another folder, or remove"):
        reproduce(dataclasses.replace(tiny, contestants=other), done, CPU)


def test_a_removed_checkpoint_takes_its_tests_with_it(tiny: Experiment, done: Path):
    before = without_times(read_results(tiny, done))
    (done / "mamba/checkpoint.pt").unlink()
    assert not reproduce(tiny, done, CPU, ["mamba"], stop=after(2))
    assert read_results(tiny, done)["mamba"]["test"] == {}
    assert reproduce(tiny, done, CPU, ["mamba"])
    assert without_times(read_results(tiny, done)) == before


def test_draw_again(tiny: Experiment, done: Path, tmp_path: Path):
    picture = done / "mamba/dt.png"
    before = picture.read_bytes()
    picture.unlink()
    assert draw(tiny, done, CPU) == [picture]
    assert picture.read_bytes() == before
    with pytest.raises(ArgumentError, match="the dt of 'attention' does not depend on the input"):
        draw(tiny, done, CPU, ["attention"])
    with pytest.raises(CheckpointError, match="no checkpoint of tiny to draw; train first"):
        draw(tiny, tmp_path / "nothing", CPU)
    with pytest.raises(CheckpointError, match="is missing; train the model first"):
        draw(tiny, tmp_path / "nothing", CPU, ["mamba"])
