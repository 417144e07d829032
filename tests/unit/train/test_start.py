from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mambakit.data import load_tokenizer, prepare
from mambakit.errors import CheckpointError, ConfigError
from mambakit.models import (
    MambaConfig,
    MambaLanguageModel,
    Quantisation,
    load_model,
    quantise,
    save_model,
)
from mambakit.models.adapter import CONFIG, WEIGHTS, base_of
from mambakit.train import Callback, Outcome, TrainConfig, Trainer
from mambakit.train.checkpointing import find_model, list_checkpoints
from mambakit.train.metrics import read_log
from mambakit.train.start import find_start

peft = pytest.importorskip("peft")

MODEL = MambaConfig(d_model=16, n_layer=2, vocab_size=257)
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(MambaLanguageModel(MODEL), tmp_path / "base", tokenizer=load_tokenizer("bytes"))
    return tmp_path / "base"


@pytest.fixture
def make_lora(make_config: MakeConfig, base: Path) -> MakeConfig:
    def make(**changes: Any) -> TrainConfig:
        return make_config(**{"init_from": str(base), "lora": True, "lora_rank": 4, **changes})

    return make


def weights(model: MambaLanguageModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, loss: float) -> None:
        if trainer.step == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_a_run_starts_with_the_weights_of_a_checkpoint(make_config: MakeConfig, base: Path) -> None:
    trainer = Trainer(make_config(init_from=str(base)))
    assert_same(weights(trainer.model), weights(load_model(base)))
    assert trainer.adapter is None
    trainer.fit()
    found = weights(load_model(find_model(trainer.config.out)))
    before = weights(load_model(base))
    assert all(not torch.equal(found[name], before[name]) for name in before)


def test_a_run_that_goes_on_needs_its_start_no_more(
    make_config: MakeConfig, base: Path, tmp_path: Path
) -> None:
    whole = Trainer(make_config(init_from=str(base), out=tmp_path / "whole"))
    whole.fit()
    config = make_config(init_from=str(base))
    Trainer(config, callbacks=[StopAt(3)]).fit()
    base.rename(tmp_path / "gone")
    rest = Trainer(config)
    assert rest.fit() == Outcome(6, None)
    assert_same(weights(rest.model), weights(whole.model))
    with pytest.raises(CheckpointError, match="base is not a checkpoint"):
        Trainer(config, overwrite=True)


def test_half_precision_is_trained_in_float32(make_config: MakeConfig, base: Path) -> None:
    save_model(load_model(base).bfloat16(), base, tokenizer=load_tokenizer("bytes"))
    trainer = Trainer(make_config(init_from=str(base)))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:unclosed file")  # Peft leaves the config open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_only_adapters_are_trained_and_saved(make_lora: MakeConfig, base: Path) -> None:
    config = make_lora(steps=30, lr=0.03, valid_every=0, save_every=30)
    trainer = Trainer(config)
    before = weights(trainer.model)
    trainer.fit()
    changed = {n for n, tensor in weights(trainer.model).items() if not tensor.equal(before[n])}
    assert changed == {name for name in before if "lora_" in name}
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(changed) == 2 * 4 * 2
    folder = find_model(config.out)
    assert sorted(path.name for path in folder.iterdir()) == [
        CONFIG, WEIGHTS, "tokenizer.json", "training_state.pt",
    ]  # fmt: skip
    assert base_of(folder) == str(base)
    size = sum(p.numel() for p in trained) * 4
    assert (folder / WEIGHTS).stat().st_size < size + 10_000
    log = read_log(config.out / "log.jsonl")
    assert log[-1]["valid_loss_nats"] < log[0]["train_loss_nats"] - 0.1
    ids = torch.arange(20)[None]
    expected = trainer.model.eval()(ids)[0]
    torch.testing.assert_close(load_model(folder)(ids)[0], expected, rtol=1e-5, atol=1e-5)
    opened = peft.PeftModel.from_pretrained(load_model(base), str(folder)).eval()
    torch.testing.assert_close(opened(ids)[0], expected, rtol=1e-5, atol=1e-5)


def test_only_the_layers_that_are_named_have_adapters(make_lora: MakeConfig) -> None:
    config = make_lora(lora_targets=("x_proj",), lora_rank=2, lora_alpha=3.0)
    model = Trainer(config).model
    layers = {n.rpartition(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    assert layers == {f"backbone.layers.{i}.mixer.x_proj" for i in range(2)}
    assert model.get_submodule("backbone.layers.0.mixer.x_proj").scaling == {"default": 1.5}


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_run_of_adapters_goes_on_bit_for_bit(
    make_lora: MakeConfig, tmp_path: Path, stop: int
) -> None:
    changes = {"lora_dropout": 0.3, "accumulation": 2, "activation_checkpointing": True}
    whole = Trainer(make_lora(out=tmp_path / "whole", **changes))
    whole.fit()
    config = make_lora(**changes)
    assert Trainer(config, callbacks=[StopAt(stop)]).fit() == Outcome(stop, signal.SIGTERM)
    rest = Trainer(config)
    assert (rest.step, rest.changes) == (stop, [])
    assert rest.fit() == Outcome(6, None)
    assert_same(weights(rest.model), weights(whole.model))


def test_dropout_is_for_training_alone(make_lora: MakeConfig, tmp_path: Path) -> None:
    losses = []
    for dropout in (0.0, 0.9):
        config = make_lora(lora_dropout=dropout, out=tmp_path / str(dropout), lr=1e-9, min_lr=0)
        Trainer(config).fit()
        losses.append(read_log(config.out / "log.jsonl")[-1]["valid_loss_nats"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 2, "lora_alpha": 4.0}, "another lora_rank 4 -> 2, lora_alpha 16.0 -> 4.0;"),
        ({"lora_targets": ("x_proj",)}, "another lora_targets ['in_proj', "),
        ({"lora": False, "lora_rank": 8}, "another lora True -> False, lora_rank 4 -> 8"),
    ],
)
def test_a_run_does_not_go_on_with_other_adapters(
    make_lora: MakeConfig, changes: dict[str, Any], message: str
) -> None:
    Trainer(make_lora()).fit()
    with pytest.raises(ConfigError) as caught:
        Trainer(make_lora(**changes))
    assert message in str(caught.value)


def test_a_run_does_not_go_on_with_other_weights(make_lora: MakeConfig, base: Path) -> None:
    Trainer(make_lora()).fit()
    torch.manual_seed(9)
    save_model(MambaLanguageModel(MODEL), base, tokenizer=load_tokenizer("bytes"))
    with pytest.raises(ConfigError, match="cannot go on with another checkpoint to adapt;"):
        Trainer(make_lora())


def test_a_run_goes_on_where_its_base_has_moved(
    make_lora: MakeConfig, base: Path, tmp_path: Path
) -> None:
    Trainer(make_lora()).fit()
    base.rename(tmp_path / "moved")
    config = make_lora(init_from=str(tmp_path / "moved"), steps=8)
    assert Trainer(config).fit() == Outcome(8, None)
    assert base_of(find_model(config.out)) == str(tmp_path / "moved")


def test_a_run_of_the_time_before_adapters_goes_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    identity = Trainer._identity

    def old_identity(trainer: Trainer) -> dict[str, Any]:
        values = identity(trainer)
        model = {k: v for k, v in values["model"].items() if k != "block"}
        new = ("lora", "init_from", "base_content")
        return {**{k: v for k, v in values.items() if not k.startswith(new)}, "model": model}

    monkeypatch.setattr(Trainer, "_identity", old_identity)
    Trainer(config, callbacks=[StopAt(2)]).fit()
    monkeypatch.undo()
    rest = Trainer(config)
    assert (rest.step, rest.changes) == (2, [])


def test_a_run_folder_stands_for_its_last_checkpoint(make_config: MakeConfig, base: Path) -> None:
    first = make_config()
    Trainer(first).fit()
    last = list_checkpoints(first.out)[-1]
    assert find_start(str(first.out)) == str(last)
    assert find_start(str(base)) == str(base)
    assert find_start("some/mamba") == "some/mamba"
    second = make_config(init_from=str(first.out), lora=True, out=first.out.with_name("second"))
    Trainer(second).fit()
    assert base_of(find_model(second.out)) == str(last)
    third = make_config(init_from=str(second.out), lora=True, out=first.out.with_name("third"))
    trainer = Trainer(third)
    merged = load_model(find_model(second.out))
    ids = torch.arange(20)[None]
    assert torch.equal(trainer.model(ids)[0], merged(ids)[0])


def test_another_model_than_the_checkpoint_has(make_config: MakeConfig, base: Path) -> None:
    other = MambaConfig(d_model=24, n_layer=2, vocab_size=257)
    with pytest.raises(ConfigError, match="base has d_model = 16; leave these options out, or in"):
        Trainer(make_config(init_from=str(base), model=other))
    with pytest.raises(ConfigError, match="init_from is '.*base', but a model is given too"):
        Trainer(make_config(init_from=str(base)), model=MambaLanguageModel(MODEL))
    small = MambaConfig(d_model=16, n_layer=2, vocab_size=100)
    with pytest.raises(ConfigError, match="prepare the text with the tokenizer of .*base"):
        Trainer(make_config(init_from=str(base), model=small))


def test_a_model_with_adapters_of_its_own(make_config: MakeConfig) -> None:
    model = MambaLanguageModel(MODEL)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["x_proj"]))
    with pytest.raises(ConfigError, match="has adapters already; merge them"):
        Trainer(make_config(), model=model)


def test_text_of_another_tokenizer(make_config: MakeConfig, base: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<|endoftext|>": 0, **{chr(97 + i): i + 1 for i in range(26)}}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<|endoftext|>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b c\n" * 2000, encoding="utf-8")
    prepare(tmp_path / "text.txt", tmp_path / "tokens", tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError) as caught:
        Trainer(make_config(init_from=str(base), data=tmp_path / "tokens"))
    assert "tokens was prepared with another tokenizer than" in str(caught.value)
    assert f"prepare the text again with --tokenizer {base}" in str(caught.value)
    (base / "tokenizer.json").unlink()
    Trainer(make_config(init_from=str(base), data=tmp_path / "tokens"))


def test_a_quantised_start(make_lora: MakeConfig, make_config: MakeConfig, base: Path) -> None:
    model = load_model(base)
    quantise(model, Quantisation(bits=8))
    save_model(model, base)
    for config in (make_lora(), make_config(init_from=str(base))):
        with pytest.raises(ConfigError, match="quantised to 8 bits, which have no gradient"):
            Trainer(config)
