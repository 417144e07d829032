"""Adapters on a GPU: neither joined products, nor recomputation, nor decoding kernels, nor graphs pass them by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mambakit.data import load_tokenizer, prepare
from mambakit.generate import Engine, Request, SamplingOptions
from mambakit.models import MambaConfig, MambaLanguageModel, load_model, save_model
from mambakit.train import TrainConfig, Trainer
from mambakit.train.checkpointing import find_model
from mambakit.train.step_graph import EAGER_STEPS

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.gpu

MIXER = ["in_proj", "x_proj", "dt_proj", "out_proj"]
MODEL = MambaConfig(d_model=128, n_layer=2, vocab_size=257)


def adapt(targets: list[str], **options: Any) -> tuple[Any, MambaLanguageModel]:
    """A model with adapters that are not at their start, and one with the same in its weights."""
    torch.manual_seed(0)
    model = MambaLanguageModel(MODEL).cuda()
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(model, config)
    return adapted, copy.deepcopy(adapted).merge_and_unload().requires_grad_(True)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("targets", [MIXER, *([name] for name in MIXER)], ids=",".join)
def test_gradients_are_those_of_the_merged_model(targets: list[str], checkpointed: bool) -> None:
    adapted, plain = adapt(targets)
    ids = torch.randint(0, 257, (2, 70), device="cuda")
    losses = []
    for model in (adapted.base_model.model, plain):
        model.activation_checkpointing = checkpointed
        loss, _ = model.loss(ids, ids)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert len(layers) == 2 * len(targets)
    for name, layer in layers.items():
        whole = plain.get_submodule(name).weight.grad
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scale = layer.scaling["default"]
        for found, expected in (
            (down.grad, scale * up.T @ whole),
            (up.grad, scale * whole @ down.T),
        ):
            assert (found - expected).norm() < 1e-3 * expected.norm(), name


@pytest.mark.parametrize("target", MIXER)
def test_decoding_counts_every_adapter(target: str) -> None:
    adapted, plain = adapt([target])
    ids = torch.randint(0, 257, (3,), device="cuda")
    logits = [m.step(ids, m.initial_state(3)) for m in (adapted.base_model.model.eval(), plain)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_engine_writes_what_the_merged_model_writes(cuda_graphs: bool) -> None:
    adapted, plain = adapt(MIXER)
    greedy = SamplingOptions(temperature=0)
    requests = [Request(prompt=[*range(1, n)], options=greedy, max_tokens=20) for n in (2, 5, 30)]
    written = [
        [done.tokens for done in Engine(m, slots=4, cuda_graphs=cuda_graphs).generate(requests)]
        for m in (adapted.base_model.model.eval(), plain)
    ]
    assert written[0] == written[1]


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    torch.manual_seed(0)
    save_model(MambaLanguageModel(MODEL), tmp_path / "base", tokenizer=load_tokenizer("bytes"))
    text = "".join(f"{n} green bottles hanging on the wall.\n" for n in range(3000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    prepare(tmp_path / "text.txt", tmp_path / "tokens", valid_fraction=0.1)

    def make(name: str, **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "data": tmp_path / "tokens", "out": tmp_path / name, "model": MODEL, "lora": True,
            "init_from": str(tmp_path / "base"), "steps": EAGER_STEPS + 8, "batch_size": 4,
            "seqlen": 64, "lr": 0.01, "device": "cuda", "valid_tokens": 1024,
        }  # fmt: skip
        return TrainConfig(**{**values, **changes})

    return make


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_is_the_same_in_a_cuda_graph(
    make_config: Callable[..., TrainConfig], precision: Any, dropout: float, checkpointed: bool
) -> None:
    results = []
    for cuda_graph in (False, True):
        config = make_config(
            str(cuda_graph), cuda_graph=cuda_graph, precision=precision, lora_dropout=dropout,
            activation_checkpointing=checkpointed,
        )  # fmt: skip
        trainer = Trainer(config)
        trainer.fit()
        trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * 4 * 2
        assert all(p.isfinite().all() for p in trained.values())
        assert all(p.abs().sum() > 0 for p in trained.values())
        results.append(trained)
        ids = torch.randint(0, 257, (2, 40), device="cuda")
        merged = load_model(find_model(config.out), "cuda")
        expected = trainer.model.eval()(ids)[0]
        torch.testing.assert_close(merged(ids)[0], expected, rtol=1e-3, atol=1e-3)
    if not dropout:
        for name, parameter in results[0].items():
            assert torch.equal(parameter, results[1][name]), name
