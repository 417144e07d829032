from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mambakit.errors import ArgumentError, CheckpointError, ConfigError
from mambakit.models import (
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
        ({"bits": 4, "group_size": 64}, r"has shape .*|is torch\.int8, wanted torch\.int16"),
        ({"bits": 8, "group_size": 32}, "scales has shape"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, value, message) -> None:
    save_model(quantised(make_model(d_model=64)), tmp_path)
    path = tmp_path / "config.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "quantisation": value}))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)
