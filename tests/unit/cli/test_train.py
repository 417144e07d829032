from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mambakit.cli.parsing import parse
from mambakit.cli.train import Train, defaults
from mambakit.data import prepare
from mambakit.errors import ConfigError, MambakitError
from mambakit.models import MambaConfig, MambaLanguageModel, save_model
from mambakit.train.config import TrainConfig, write_toml


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


def test_a_checkpoint_gives_the_shape(corpus: Path, tmp_path: Path) -> None:
    shape = MambaConfig(d_model=16, n_layer=3, vocab_size=300)
    save_model(MambaLanguageModel(shape), tmp_path / "base")
    args = ("--data", corpus, "--out", "run", "--init-from", tmp_path / "base")
    config = read(*args)
    assert (config.model, config.init_from) == (shape, str(tmp_path / "base"))
    assert not config.lora
    file = tmp_path / "run.toml"
    write_toml(config, file)
    assert read("--config", file) == config
    file.write_text(f"init_from = {str(tmp_path / 'base')!r}\nlora_rank = 2", encoding="utf-8")
    config = read("--data", corpus, "--out", "run", "--config", file, "--lora")
    assert (config.model, config.lora, config.lora_rank) == (shape, True, 2)


def test_options_of_adapters(corpus: Path, tmp_path: Path) -> None:
    save_model(MambaLanguageModel(MambaConfig(d_model=16, n_layer=1, vocab_size=257)), tmp_path)
    args = ["--data", corpus, "--out", "run", "--init-from", tmp_path, "--lora"]
    config = read(*args)
    assert config.lora_targets == ("in_proj", "x_proj", "dt_proj", "out_proj")
    options = "--lora-rank 3 --lora-alpha 5 --lora-dropout 0.1 --lora-targets dt_proj x_proj"
    config = read(*args, *options.split())
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (3, 5.0, 0.1)
    assert config.lora_targets == ("x_proj", "dt_proj")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--lora"],
            "lora has no weights to adapt; name a checkpoint with init_from (--init-from)",
        ),
        (["--lora-rank", "4"], "lora_rank is 4, but lora is off; set lora = true (--lora)"),
        (
            ["--lora", "--init-from", "{}", "--lora-rank", "0"],
            "lora_rank is 0, not an integer from",
        ),
        (["--lora", "--init-from", "{}", "--lora-targets", "q_proj"], "q_proj"),
        (
            ["--lora", "--init-from", "{}", "--lora-targets"],
            "lora_targets is (), not a list of some",
        ),
        (["--init-from", "nowhere"], "nowhere is not a checkpoint: it has no config.json; name"),
    ],
)
def test_adapters_with_a_mistake(
    corpus: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    save_model(MambaLanguageModel(MambaConfig(d_model=16, n_layer=1, vocab_size=257)), tmp_path)
    with pytest.raises(MambakitError) as caught:
        read("--data", corpus, "--out", "run", *(arg.format(tmp_path) for arg in args))
    assert message in str(caught.value)


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
