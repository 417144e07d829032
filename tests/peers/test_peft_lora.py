"""LoRA adapters of peft on our model, on every way through it: they count exactly, and never go unseen."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mambakit.generate import Engine, Request, SamplingOptions
from mambakit.models import FORMATS, MambaConfig, MambaLanguageModel, load_model
from mambakit.nn import joined_gradients
from mambakit.nn import mixer as mixer_module

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # The peer's own.

MIXER = ["in_proj", "x_proj", "dt_proj", "out_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "biases": {"bias": True, "conv_bias": False},
    "norms": {"mixer_norm_epsilon": 1e-3},
    "complex": {"A_init": "s4d-lin"},
    "h3": {"block": "h3"},
    "ungated": {"block": "ungated"},
}


def make_model(**fields: Any) -> MambaLanguageModel:
    torch.manual_seed(0)
    return MambaLanguageModel(
        MambaConfig(**{"d_model": 16, "n_layer": 2, "vocab_size": 40, **fields})
    )


def adapt(model: MambaLanguageModel, targets: list[str] = MIXER, **options: Any) -> Any:
    """With values that are not those of the start, when nothing has changed."""
    options = {"init_lora_weights": False, **options}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options)
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return adapted.eval()


def merged(adapted: Any) -> MambaLanguageModel:
    """A plain model of its own with the adapters in its weights."""
    plain = copy.deepcopy(adapted).merge_and_unload()
    assert all("lora" not in name for name, _ in plain.named_modules())
    return plain.requires_grad_(True)


def tokens() -> Tensor:
    return torch.randint(0, 40, (2, 9))


@pytest.fixture(params=["composed", "recomputed", "joined", "checkpointed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the mixer does in training, here and on a GPU."""
    on_a_gpu = ("cpu",) if request.param in ("recomputed", "joined") else ()
    monkeypatch.setattr(mixer_module, "RECOMPUTES_ON", on_a_gpu)
    monkeypatch.setattr(joined_gradients, "JOINS_ON", on_a_gpu if request.param == "joined" else ())
    return str(request.param)


@pytest.mark.parametrize("targets", [MIXER, *([name] for name in MIXER)], ids=",".join)
def test_outputs_and_gradients_are_those_of_the_merged_model(way, targets):
    adapted = adapt(make_model(), targets)
    plain = merged(adapted)
    ids = tokens()
    losses = []
    for model in (adapted.base_model.model, plain):
        model.train()
        model.activation_checkpointing = way == "checkpointed"
        loss, _ = model.loss(ids, ids)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    seen = 0
    for layer in (m for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)):
        name = next(name for name, module in adapted.named_modules() if module is layer)
        of_whole = plain.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scale = layer.scaling["default"]
        torch.testing.assert_close(down.grad, scale * up.T @ of_whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(up.grad, scale * of_whole @ down.T, rtol=1e-5, atol=1e-5)
        assert down.grad.abs().sum() > 0
        seen += 1
    assert seen == 2 * len(targets)
    frozen = [p for name, p in adapted.named_parameters() if "lora_" not in name]
    assert all(parameter.grad is None for parameter in frozen)


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_every_way_to_read_gives_what_the_merged_model_gives(fields):
    adapted = adapt(make_model(**fields))
    model, plain = adapted.base_model.model, merged(adapted)
    ids = tokens()
    expected, _ = plain(ids)
    assert not torch.allclose(expected, make_model(**fields)(ids)[0], atol=1e-2)
    torch.testing.assert_close(adapted(ids)[0], expected, rtol=1e-5, atol=1e-5)
    last, state = model.prefill(ids[:, :5], chunk=2)
    torch.testing.assert_close(last, expected[:, 4], rtol=1e-5, atol=1e-5)
    for position in range(5, 9):
        logits = model.step(ids[:, position], state)
        torch.testing.assert_close(logits, expected[:, position], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", MIXER)
def test_one_adapter_is_enough_to_leave_the_compiled_step(target):
    adapted = adapt(make_model(), [target])
    ids = tokens()[:, 0]
    states = [make_model().initial_state(2) for _ in range(2)]
    logits = adapted.base_model.model.step(ids, states[0])
    torch.testing.assert_close(logits, merged(adapted).step(ids, states[1]), rtol=1e-5, atol=1e-5)
    for one, other in zip(*(state.layers for state in states), strict=True):
        torch.testing.assert_close(one.ssm_state, other.ssm_state, rtol=1e-5, atol=1e-5)


def test_generation_is_that_of_the_merged_model():
    adapted = adapt(make_model())
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    greedy = SamplingOptions(temperature=0)
    requests = [Request(prompt=p, options=greedy, max_tokens=12) for p in prompts]
    expected = [done.tokens for done in Engine(merged(adapted)).generate(requests)]
    assert [done.tokens for done in Engine(adapted.base_model.model).generate(requests)] == expected
    assert adapted.generate(prompts, max_tokens=12, temperature=0) == expected
    assert make_model().generate(prompts, max_tokens=12, temperature=0) != expected


def test_autocast_and_dropout():
    adapted = adapt(make_model(), lora_dropout=0.5)
    model, plain = adapted.base_model.model, merged(adapted)
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(ids)[0], plain(ids)[0], rtol=0.05, atol=0.05)
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])
    model.loss(ids, ids)[0].backward()
    assert all(
        parameter.grad.abs().sum() > 0
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    )


@pytest.mark.parametrize("way", ["recomputed", "joined", "checkpointed"], indirect=True)
def test_dropout_is_the_same_where_something_is_run_again(way, monkeypatch):
    adapted = adapt(make_model(), lora_dropout=0.5).train()
    model, ids = adapted.base_model.model, tokens()
    gradients = []
    for again in (True, False):
        if not again:
            monkeypatch.setattr(mixer_module, "RECOMPUTES_ON", ())
            monkeypatch.setattr(joined_gradients, "JOINS_ON", ())
        model.activation_checkpointing = again and way == "checkpointed"
        torch.manual_seed(3)
        model.loss(ids, ids)[0].backward()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        gradients.append([p.grad.clone() for p in trained])
        adapted.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_half_precision_keeps_the_recurrence_in_float32():
    adapted = adapt(make_model())
    model = adapted.base_model.model.bfloat16()
    mixer = model.backbone.layers[0].mixer
    assert mixer.dt_proj.base_layer.bias.dtype == torch.float32
    assert mixer.dt_proj.base_layer.weight.dtype == torch.bfloat16
    assert model(tokens())[0].dtype == torch.bfloat16


def test_adapters_of_an_untied_head_count_in_the_loss():
    adapted = adapt(make_model(tie_embeddings=False), ["lm_head"])
    model, ids = adapted.base_model.model, tokens()
    loss, _ = model.loss(ids, ids)
    expected, _ = merged(adapted).loss(ids, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert model.lm_head.lora_B["default"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("format", FORMATS)
def test_a_merged_model_is_ours_again_and_is_saved_in_every_format(tmp_path, format):
    model = make_model()
    adapted = adapt(model)
    ids = tokens()
    expected, _ = adapted(ids)
    with pytest.raises(ValueError, match="has adapters"):
        model.save_pretrained(tmp_path / "adapted", format)
    whole = adapted.merge_and_unload()
    assert whole is model
    whole.save_pretrained(tmp_path / format, format)
    if format == "gguf":
        assert (tmp_path / format / "model.gguf").stat().st_size > 4 * model.num_parameters()
    else:
        logits, _ = load_model(tmp_path / format)(ids)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_peft_saves_and_loads(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    adapted = adapt(MambaLanguageModel.from_pretrained(tmp_path / "base"))
    ids = tokens()
    expected, _ = adapted(ids)
    adapted.save_pretrained(tmp_path / "adapter")
    base = MambaLanguageModel.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(again(ids)[0], expected)
    by_itself = peft.AutoPeftModel.from_pretrained(
        tmp_path / "adapter", import_allowlist=["mambakit.models.language_model"]
    )
    assert torch.equal(by_itself(ids)[0], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "rank_pattern": {"x_proj": 5}},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"use_dora": True, "exclude_modules": ["dt_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [1], "layers_pattern": "layers", "alpha_pattern": {"in_proj": 2}},
    ],
    ids=str,
)
def test_load_model_merges_what_peft_saved(tmp_path, monkeypatch, options):
    make_model(tie_embeddings=False).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    adapted = adapt(load_model("base"), **options)
    adapted.save_pretrained("adapter")
    monkeypatch.chdir("/" if os.name != "nt" else Path.home())
    model, ids = load_model(tmp_path / "adapter"), tokens()
    torch.testing.assert_close(model(ids)[0], adapted(ids)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(ids)[0], load_model(tmp_path / "base")(ids)[0], atol=1e-2)
