from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambakit.data import TokenDataset, prepare, windows
from mambakit.errors import ConfigError, DataError, MambakitError, TrainingError
from mambakit.evaluate import count_bytes, score
from mambakit.models.checkpoint import load_model
from mambakit.models.config import MambaConfig
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.quantisation import Quantisation, quantise
from mambakit.ops.cpu import features
from mambakit.train import Callback, Outcome, TrainConfig, Trainer
from mambakit.train import trainer as trainer_module
from mambakit.train.checkpointing import find_model, list_checkpoints
from mambakit.train.metrics import read_log

MakeConfig = Callable[..., TrainConfig]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, loss: float) -> None:
        if trainer.step == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_training_lowers_the_loss_below_chance(make_config: MakeConfig) -> None:
    config = make_config(steps=60, batch_size=4, lr=0.02, save_every=60, valid_every=0)
    assert Trainer(config).fit() == Outcome(step=60, signal=None)
    log = read_log(config.out / "log.jsonl")
    assert log[0]["train_loss_nats"] == pytest.approx(math.log(264), rel=0.05)
    assert log[-1]["valid_loss_nats"] < 3.2


def test_the_same_config_gives_the_same_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    results = []
    for name in ("a", "b"):
        trainer = Trainer(make_config(out=tmp_path / name))
        trainer.fit()
        results.append(weights(trainer))
    assert_same(*results)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_run_goes_on_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, stop: int
) -> None:
    whole = Trainer(make_config(out=tmp_path / "whole", accumulation=2))
    whole.fit()
    config = make_config(accumulation=2)
    assert Trainer(config, callbacks=[StopAt(stop)]).fit() == Outcome(stop, signal.SIGTERM)
    rest = Trainer(config)
    assert (rest.step, rest.changes) == (stop, [])
    assert rest.fit() == Outcome(6, None)
    assert_same(weights(rest), weights(whole))
    assert_same(weights(rest), load_model(find_model(config.out)).state_dict())


def test_a_finished_run_is_left_as_it_is(make_config: MakeConfig) -> None:
    config = make_config()
    Trainer(config).fit()
    before = {path: path.stat().st_mtime_ns for path in list_checkpoints(config.out)}
    assert Trainer(config).fit() == Outcome(6, None)
    assert {path: path.stat().st_mtime_ns for path in list_checkpoints(config.out)} == before


def test_a_run_goes_on_with_another_length_and_rate(make_config: MakeConfig) -> None:
    Trainer(make_config()).fit()
    longer = Trainer(make_config(steps=8, lr=1e-3, weight_decay=0.0))
    assert longer.changes == ["steps 6 -> 8", "lr 0.003 -> 0.001", "weight_decay 0.1 -> 0.0"]
    assert longer.optimizer.param_groups[0]["weight_decay"] == 0.0
    assert longer.fit() == Outcome(8, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seqlen": 16, "seed": 3}, "another seqlen 32 -> 16, seed 0 -> 3;"),
        ({"model": MambaConfig(d_model=24, n_layer=2, vocab_size=257)}, "model.d_model 16 -> 24"),
    ],
)
def test_a_run_does_not_go_on_with_another_course(
    make_config: MakeConfig, changes: dict[str, Any], message: str
) -> None:
    config = make_config()
    Trainer(config).fit()
    text = (config.out / "config.toml").read_text(encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        Trainer(make_config(**changes))
    assert message in str(caught.value)
    assert (config.out / "config.toml").read_text(encoding="utf-8") == text


def test_a_run_does_not_go_on_with_another_text(make_config: MakeConfig, tmp_path: Path) -> None:
    Trainer(make_config()).fit()
    (tmp_path / "other.txt").write_text("another text\n" * 99, encoding="utf-8")
    prepare(tmp_path / "other.txt", tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot go on with another text or tokenizer;"):
        Trainer(make_config(data=tmp_path / "other"))


def test_overwrite_starts_afresh_and_leaves_other_files(make_config: MakeConfig) -> None:
    Trainer(make_config()).fit()
    config = make_config(steps=2, seqlen=16)
    (config.out / "notes.txt").write_text("mine", encoding="utf-8")
    trainer = Trainer(config, overwrite=True)
    assert trainer.step == 0
    trainer.fit()
    assert [path.name for path in list_checkpoints(config.out)] == ["step-00000002"]
    assert {record["step"] for record in read_log(config.out / "log.jsonl")} == {2}
    assert (config.out / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_accumulated_batches_are_one_large_batch(make_config: MakeConfig, tmp_path: Path) -> None:
    large = Trainer(make_config(out=tmp_path / "large", batch_size=4, accumulation=1))
    small = Trainer(make_config(out=tmp_path / "small", batch_size=2, accumulation=2))
    for trainer in (large, small):
        trainer.fit()
    for ours, theirs in zip(large.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_gradient_is_clipped(make_config: MakeConfig) -> None:
    """AdamW's running mean after one step is a tenth of the gradient that it was given."""
    trainer = Trainer(make_config(grad_clip=1e-3, steps=1, log_every=1))
    trainer.fit()
    means = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    assert float(nn.utils.get_total_norm(means)) == pytest.approx(1e-4, rel=1e-3)
    assert read_log(trainer.config.out / "log.jsonl")[0]["gradient_norm"] > 0.1


def test_a_small_gradient_is_not_clipped(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config(grad_clip=1e3, steps=1, log_every=1))
    trainer.fit()
    means = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    norm = read_log(trainer.config.out / "log.jsonl")[0]["gradient_norm"]
    assert float(nn.utils.get_total_norm(means)) == pytest.approx(norm / 10, rel=1e-4)


def test_validation_is_the_score_on_the_start_of_the_split(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config(valid_tokens=65))
    trainer.fit()
    dataset = TokenDataset(trainer.config.data, "valid")
    first = list(windows(dataset, 32, 2))[:2]  # 65 tokens: one and a bit batches of 64.
    expected = score(trainer.model, first, count_bytes(trainer.tokenizer))
    last = read_log(trainer.config.out / "log.jsonl")[-1]
    assert last == {
        "step": 6,
        "valid_loss_nats": expected.loss,
        "valid_perplexity": expected.perplexity,
        "valid_bits_per_byte": expected.bits_per_byte,
    }


def test_the_log_has_names_with_units(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config())
    trainer.fit()
    records = read_log(trainer.config.out / "log.jsonl")
    assert [(r["step"], "train_loss_nats" in r) for r in records] == [
        (2, True), (3, False), (4, True), (6, True), (6, False),
    ]  # fmt: skip
    first = records[0]
    assert first["tokens"] == 2 * 2 * 32
    assert first["tokens_per_second"] == pytest.approx(2 * 32 / first["step_seconds"])
    assert 0 < first["model_flop_utilisation"] < 1
    assert first["learning_rate"] == pytest.approx(3e-3)
    assert (trainer.config.out / "loss.png").stat().st_size > 1000


class Poison(Callback):
    """Makes the loss of one step NaN."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
        self.steps = steps
        self.seen: list[Mapping[str, float | str]] = []
        self._monkeypatch = monkeypatch

    def on_start(self, trainer: Trainer) -> None:
        loss = trainer.model.loss

        def poisoned(*args: Any, **options: Any) -> Any:
            value, state = loss(*args, **options)
            return (value * math.nan if trainer.step in self.steps else value), state

        self._monkeypatch.setattr(trainer.model, "loss", poisoned)

    def on_log(self, trainer: Trainer, values: Mapping[str, float | str]) -> None:
        self.seen.append(values)


def test_a_loss_that_is_not_finite_stops_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(accumulation=2, save_every=2)
    with pytest.raises(TrainingError) as caught:
        Trainer(config, callbacks=[Poison(monkeypatch, range(3, 4))]).fit()
    message = str(caught.value)
    assert message.startswith(
        "step 3: the loss is nan and the norm of the gradient nan, with batch"
    )
    assert "with batch 4 to 5 (epoch" in message
    assert f"the last checkpoint is {config.out / 'checkpoints' / 'step-00000002'}" in message
    assert [path.name for path in list_checkpoints(config.out)] == ["step-00000002"]


def test_a_loss_that_is_not_finite_can_be_skipped(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(monkeypatch, range(3, 4))
    trainer = Trainer(make_config(non_finite="skip", log_every=1), callbacks=[poison])
    assert trainer.fit() == Outcome(6, None)
    skipped = [values["skipped"] for values in poison.seen if "skipped" in values]
    assert len(skipped) == 1
    assert str(skipped[0]).startswith("step 3: the loss is nan")
    losses = {
        r["step"]: r.get("train_loss_nats") for r in read_log(trainer.config.out / "log.jsonl")
    }
    assert losses[3] is None
    assert math.isfinite(losses[4])
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


def test_a_step_that_is_left_out_changes_nothing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watch(Callback):
        def on_step(self, trainer: Trainer, loss: float) -> None:
            states = trainer.optimizer.state.values()
            moments = {f"{i} {k}": v.clone() for i, s in enumerate(states) for k, v in s.items()}
            seen.append({**weights(trainer), **moments})

    seen: list[dict[str, Tensor]] = []
    callbacks = [Poison(monkeypatch, range(3, 4)), Watch()]
    Trainer(make_config(non_finite="skip"), callbacks=callbacks).fit()
    assert_same(seen[2], seen[1])
    assert seen[2].keys() > {"0 exp_avg", "0 exp_avg_sq", "0 step"}
    assert not torch.equal(seen[3]["0 exp_avg"], seen[2]["0 exp_avg"])


def test_skipping_gives_up_in_the_end(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED", 2)
    poison = Poison(monkeypatch, range(1, 9))
    with pytest.raises(TrainingError, match="step 3: the loss is nan"):
        Trainer(make_config(non_finite="skip"), callbacks=[poison]).fit()


def test_bfloat16_keeps_float32_weights(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "features", lambda: {"avx512f", "avx512bf16"})
    exact = Trainer(make_config(out=tmp_path / "float32"))
    rough = Trainer(make_config(precision="bfloat16"))
    for trainer in (exact, rough):
        trainer.fit()
    assert {tensor.dtype for tensor in weights(rough).values()} == {torch.float32}
    losses = [read_log(t.config.out / "log.jsonl")[0]["train_loss_nats"] for t in (exact, rough)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_bfloat16_on_a_cpu_without(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "features", lambda: {"avx2"})
    monkeypatch.setattr(features.platform, "machine", lambda: "x86_64")
    with pytest.raises(ConfigError, match="precision: got bfloat16, but this CPU .* use float32"):
        Trainer(make_config(precision="bfloat16"))


@pytest.mark.parametrize("recomputation", [False, True])
def test_recomputation_is_the_models(make_config: MakeConfig, recomputation: bool) -> None:
    assert Trainer(make_config(recomputation=recomputation)).model.recomputation == recomputation


def test_activation_checkpointing_changes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    plain = Trainer(make_config(out=tmp_path / "plain"))
    frugal = Trainer(make_config(activation_checkpointing=True))
    for trainer in (plain, frugal):
        trainer.fit()
    assert frugal.model.activation_checkpointing
    assert_same(weights(plain), weights(frugal))


@pytest.mark.parametrize("documents", [True, False])
def test_documents_reach_the_model(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, documents: bool
) -> None:
    seen: list[bool] = []
    trainer = Trainer(make_config(documents=documents, steps=1))

    def loss(tokens: Tensor, targets: Tensor, *, seq_idx: Tensor | None) -> tuple[Tensor, None]:
        seen.append(seq_idx is not None and seq_idx.shape == tokens.shape)
        return trainer.model.lm_head.weight.mean(), None

    monkeypatch.setattr(trainer.model, "loss", loss)
    trainer.fit()
    assert len(seen) > 1  # In training and in validation.
    assert set(seen) == {documents}


def test_a_given_model_is_trained(make_config: MakeConfig) -> None:
    config = make_config()
    model = MambaLanguageModel(config.model).to(torch.bfloat16)
    trainer = Trainer(config, model=model)
    assert trainer.model is model
    assert model.backbone.embedding.weight.dtype == torch.float32
    with pytest.raises(ConfigError, match="model"):
        Trainer(make_config(model=MambaConfig(d_model=8, vocab_size=257)), model=model)


def test_a_vocabulary_that_is_too_small(make_config: MakeConfig) -> None:
    with pytest.raises(
        ConfigError, match=r"vocab_size is 100, .* has 257 ids; set vocab_size = 257"
    ):
        Trainer(make_config(model=MambaConfig(d_model=16, n_layer=1, vocab_size=100)))


def test_a_corpus_shorter_than_a_sequence(make_config: MakeConfig) -> None:
    with pytest.raises(DataError, match="fewer than one window of 100,000"):
        Trainer(make_config(seqlen=100_000))


def test_a_folder_that_cannot_be_written_is_found_at_once(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(MambakitError, match="cannot be written: a part of this path is a file"):
        Trainer(make_config(out=tmp_path / "file" / "run"))


def test_callbacks_are_called_in_order(make_config: MakeConfig) -> None:
    calls: list[str] = []

    class Watch(Callback):
        def on_start(self, trainer: Trainer) -> None:
            calls.append(f"start {trainer.step}")

        def on_step(self, trainer: Trainer, loss: float) -> None:
            calls.append(f"step {trainer.step}")

        def on_log(self, trainer: Trainer, values: Mapping[str, float | str]) -> None:
            calls.append(f"log {trainer.step}")

        def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
            calls.append(folder.name)

        def on_end(self, trainer: Trainer) -> None:
            calls.append("end")

    Trainer(make_config(steps=2, valid_every=2), callbacks=[Watch()]).fit()
    assert calls == ["start 0", "step 1", "step 2", "log 2", "log 2", "step-00000002", "end"]


def test_a_quantised_model_is_refused(make_config: MakeConfig) -> None:
    config = make_config()
    model = MambaLanguageModel(config.model)
    quantise(model, Quantisation(bits=4))
    with pytest.raises(
        ConfigError, match="the model is quantised to 4 bits, which have no gradient"
    ):
        Trainer(config, model)
