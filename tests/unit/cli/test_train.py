from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mambakit.cli.parsing import parse
from mambakit.cli.train import Train, defaults
from mambakit.data import prepare
from mambakit.errors import ConfigError, MambakitError
from mambakit.train.config import TrainConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("some text\n" * 9, encoding="utf-8")
    prepare(folder / "text.txt", folder / "tokens")
    return folder / "tokens"


def read(*args: Any) -> TrainConfig:
    texts = [str(arg) for arg in args]
    return parse(Train, texts, "train", default=defaults(texts)).training


def test_flags_set_training_and_model(corpus: Path) -> None:
    config = read("--data", corpus, "--out", "run", "--d-model", 24, "--lr", 0.01, "--documents")
    assert (config.data, config.out) == (corpus, Path("run"))
    assert (config.model.d_model, config.lr, config.documents) == (24, 0.01, True)


@pytest.mark.parametrize("form", [["--data={}"], ["--data", "{}"]])
def test_the_vocabulary_is_that_of_the_data(corpus: Path, form: list[str]) -> None:
    assert read(*(part.format(corpus) for part in form), "--out", "r").model.vocab_size == 257
    explicit = read("--data", corpus, "--out", "run", "--vocab-size", 300)
    assert explicit.model.vocab_size == 300


def test_a_preset_sets_the_shape_and_flags_change_it(corpus: Path) -> None:
    model = read("--data", corpus, "--out", "r", "--preset", "370m", "--n-layer", 2).model
    assert (model.d_model, model.n_layer, model.vocab_size) == (1024, 2, 257)


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(
    corpus: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f"data = {str(corpus)!r}\nout = 'run'\nsteps = 7\nlr = 0.02\n[model]\nd_model = 40",
        encoding="utf-8",
    )
    config = read("--config", file, "--steps", 9)
    assert (config.steps, config.lr, config.batch_size) == (9, 0.02, 8)
    assert (config.model.d_model, config.model.vocab_size) == (40, 257)
    assert read("--config", file, "--preset", "130m").model.d_model == 768


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stpes = 3", "unknown field 'stpes'; did you mean 'steps'?"),
        ("[model]\nd_modle = 3", "unknown field 'd_modle'; did you mean 'd_model'?"),
        ("steps = 0", "steps is 0, not an integer from 1"),
        ("model = 3", "model is 3, not a table"),
        ("[", "is not TOML"),
    ],
)
def test_a_file_with_a_mistake(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read("--config", file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Missing from mambakit train: --data PATH --out PATH"),
        (["--data", "a"], "Missing from mambakit train: --out PATH"),
        (["--preset", "13m"], "no preset is named '13m'; did you mean '130m'?"),
        (["--config", "none.toml"], "config file none.toml cannot be read"),
        (["--data", "a", "--out", "b", "--d-model", "0"], "d_model is 0, not an integer from 1"),
        (["--data", "a", "--out", "b", "--steps", "-3"], "steps is -3, not an integer from 1"),
    ],
)
def test_flags_with_a_mistake(args: list[str], message: str) -> None:
    with pytest.raises(MambakitError) as caught:
        read(*args)
    assert message in str(caught.value)
