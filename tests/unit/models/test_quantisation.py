from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mambakit.errors import ArgumentError, CheckpointError, ConfigError
from mambakit.models import (
    FORMATS,
    MambaConfig,
    MambaLanguageModel,
    Quantisation,
    load_model,
    quantise,
    save_model,
)
from mambakit.models.checkpoint import read_quantisation
from mambakit.nn.quantised_linear import QuantisedLinear
from mambakit.ops.quantisation import dequantise

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6]])


def make_model(**fields) -> MambaLanguageModel:
    torch.manual_seed(0)
    fields = {"d_model": 48, "n_layer": 2, "vocab_size": 50, **fields}
    return MambaLanguageModel(MambaConfig(**fields))


def quantised(model: MambaLanguageModel, **fields) -> MambaLanguageModel:
    other = copy.deepcopy(model)
    quantise(other, Quantisation(**fields))
    return other


CONFIGS = [
    {},
    {"tie_embeddings": False},
    {"bias": True, "selective": ("B",), "A_init": "s4d-lin"},
    {"selective": ()},
    {"mixer_norm_epsilon": 1e-3},
]


@pytest.mark.parametrize("fields", CONFIGS)
@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_the_model_with_rounded_matrices(fields, bits) -> None:
    model = make_model(**fields)
    small = quantised(model, bits=bits, group_size=32)
    names = dict(small.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            found = names[f"{name}.table" if isinstance(module, nn.Embedding) else name]
            eight = bits == 8 or name.endswith(("x_proj", "dt_proj"))
            assert found.matrix.bits == (8 if eight else 4)
            rounded = dequantise(found.matrix, torch.float32)
            assert (rounded - module.weight).norm() < (
                0.008 if eight else 0.1
            ) * module.weight.norm()
            module.weight.data = rounded
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    logits, state = small(TOKENS)  # with gradients, and so by the reference
    expected, expected_state = model(TOKENS)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(small.loss(TOKENS, TOKENS)[0], model.loss(TOKENS, TOKENS)[0])
    for layer, other in zip(state.layers, expected_state.layers, strict=True):
        torch.testing.assert_close(layer.ssm_state, other.ssm_state)
    step = model.step(TOKENS[:, 0], expected_state)
    torch.testing.assert_close(small.step(TOKENS[:, 0], state), step, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fields", CONFIGS)
@pytest.mark.parametrize("bits", [8, 4])
def test_round_trip(tmp_path: Path, fields, bits) -> None:
    model = quantised(make_model(**fields), bits=bits, group_size=128)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.quantisation == Quantisation(bits=bits, group_size=128)
    assert read_quantisation(tmp_path) == loaded.quantisation
    assert loaded.num_parameters() == make_model(**fields).num_parameters()
    tied = loaded.lm_head is loaded.backbone.embedding.table
    assert tied == model.config.tie_embeddings
    for (name, tensor), other in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name
    assert torch.equal(loaded(TOKENS)[0], model(TOKENS)[0])
    assert loaded.generate([[1, 2]], max_tokens=4, temperature=0) == model.generate(
        [[1, 2]], max_tokens=4, temperature=0
    )


def test_a_float_checkpoint_is_written_as_before(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["version"] == 1
    assert "quantisation" not in description
    assert read_quantisation(tmp_path) is None


def test_the_head_stays_tied_and_cast_models_are_loaded(tmp_path: Path) -> None:
    model = quantised(make_model()).bfloat16()
    assert model.lm_head is model.backbone.embedding.table
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded(TOKENS)[0].dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32)(TOKENS)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_codes_and_scales_are_not_cast(tmp_path: Path, dtype) -> None:
    model = quantised(make_model())
    save_model(model, tmp_path)
    found = load_model(tmp_path, dtype=dtype).state_dict()
    for name, tensor in model.to(dtype).state_dict().items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert found["lm_head.codes"].dtype == torch.int8
    assert found["lm_head.scales"].dtype == torch.bfloat16


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def test_scales_of_another_dtype(tmp_path: Path) -> None:
    save_model(quantised(make_model()), tmp_path)
    name = "backbone.layers.1.mixer.out_proj.scales"
    edit_weights(tmp_path, lambda weights: weights.update({name: weights[name].float()}))
    with pytest.raises(
        CheckpointError, match=rf"{name}: got dtype torch\.float32, wanted torch\.bfloat16$"
    ):
        load_model(tmp_path)


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    save_model(quantised(make_model()), tmp_path)
    edit_weights(
        tmp_path, lambda weights: weights["backbone.embedding.table.scales"].fill_(torch.nan)
    )
    with pytest.warns(
        UserWarning, match=r"NaN or infinite numbers in backbone\.embedding\.table\.sc"
    ):
        load_model(tmp_path)


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path: Path) -> None:
    save_model(quantised(make_model()), tmp_path)
    names = {"lm_head.codes", "lm_head.scales"}
    assert names.isdisjoint(load_file(tmp_path / "model.safetensors"))
    table = "backbone.embedding.table."
    edit_weights(
        tmp_path,
        lambda w: w.update({n: w[table + n.removeprefix("lm_head.")].clone() for n in names}),
    )
    loaded = load_model(tmp_path)
    assert loaded.lm_head is loaded.backbone.embedding.table
    edit_weights(tmp_path, lambda weights: weights["lm_head.codes"][3].add_(1))
    with pytest.raises(
        CheckpointError, match=r"json: the head is tied .*, but lm_head\.codes is not \S+codes$"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "mambakit"])
def test_other_formats_have_no_quantised_models(tmp_path: Path, format) -> None:
    model = quantised(make_model(pad_vocab_size_multiple=1))
    with pytest.raises(
        ArgumentError,
        match=f"format: got '{format}', but the model is quantised, wanted 'mambakit'",
    ):
        model.save_pretrained(tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    quantise(make_model(), Quantisation(), lambda done, total: seen.append((done, total)))
    assert seen == [(i, 9) for i in range(1, 10)]


def test_wrong_models() -> None:
    model = quantised(make_model(), bits=4)
    with pytest.raises(ArgumentError, match="model: is quantised to 4 bits already"):
        quantise(model, Quantisation())
    with pytest.raises(ArgumentError, match=r"backbone\.embedding is torch\.bfloat16"):
        quantise(make_model().bfloat16(), Quantisation())
    adapted = make_model()
    adapted.backbone.layers[1].mixer.out_proj = nn.Sequential(
        adapted.backbone.layers[1].mixer.out_proj
    )
    with pytest.raises(ArgumentError, match=r"layers\.1\.mixer\.out_proj is a Sequential"):
        quantise(adapted, Quantisation())
    assert not any(isinstance(m, QuantisedLinear) for m in adapted.modules())
    with pytest.raises(ArgumentError, match="flops_per_token: a quantised model is not trained"):
        model.flops_per_token(10)


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match=r"bits is 3, not one of \(8, 4\)"):
        Quantisation(bits=3)
    with pytest.raises(ConfigError, match=r"group_size is 96, not one of \(32, 64, 128\)"):
        Quantisation(group_size=96)
    with pytest.raises(
        ConfigError, match=r"got the fields \['bits'\], wanted \['bits', 'group_size'\]"
    ):
        Quantisation.from_dict({"bits": 8})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"bits": 2, "group_size": 64}, "bits is 2"),
        ("int8", "wanted fields"),
        (
            {"bits": 4, "group_size": 64},
            r"table\.codes: got shape \(56, 64\), wanted \(56, 16\);.* got dtype torch\.int8, wanted torch\.int16",
        ),
        (
            {"bits": 8, "group_size": 32},
            r"table\.scales: got shape \(56, 1\), wanted \(56, 2\)",
        ),
        (
            None,
            r"it lacks backbone\.embedding\.weight, .*; it has the unknown backbone\.embedding\.table",
        ),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, value, message) -> None:
    save_model(quantised(make_model(d_model=64)), tmp_path)
    path = tmp_path / "config.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "quantisation": value}))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)
