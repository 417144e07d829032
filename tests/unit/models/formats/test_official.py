from __future__ import annotations

import json

import pytest
import torch

from mambakit.errors import CheckpointError, ConfigError
from mambakit.models import MambaConfig, MambaLanguageModel, load_model, preset, save_model
from mambakit.models.formats.official import LAYOUT

PUBLISHED = {
    "d_model": 768,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
"""config.json of the released 130M model."""


def make_model(**fields) -> MambaLanguageModel:
    return MambaLanguageModel(
        MambaConfig(**{"d_model": 16, "n_layer": 2, "vocab_size": 50, **fields})
    )


def test_a_published_config():
    assert LAYOUT.recognises(PUBLISHED)
    assert LAYOUT.read(PUBLISHED) == preset("130m")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_embeddings": False, "bias": True, "conv_bias": False, "residual_in_fp32": False},
        {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7, "pad_vocab_size_multiple": 1},
        {"dt_min": 0.01, "dt_max": 0.2, "dt_init": "constant", "dt_scale": 2.0},
    ],
)
def test_round_trip(tmp_path, fields):
    model = make_model(**fields)
    save_model(model, tmp_path, "official")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_file_has_every_name_that_the_official_model_asks_for(tmp_path):
    model = make_model()
    save_model(model, tmp_path, "official")
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert weights.keys() == model.state_dict().keys()
    head, embedding = weights["lm_head.weight"], weights["backbone.embedding.weight"]
    assert head.data_ptr() == embedding.data_ptr()  # stored once
    description = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert description["ssm_cfg"]["layer"] == "Mamba1"
    assert description["vocab_size"] == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm": False}, "rms_norm is False, wanted True: other layers than Mamba's"),
        ({"attn_layer_idx": [3]}, r"attn_layer_idx is \[3\], wanted \[\]"),
        ({"d_intermediate": 64}, "d_intermediate is 64, wanted 0"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "layer is 'Mamba2', wanted 'Mamba1': other mixers"),
        ({"ssm_cfg": {"d_stat": 3}}, "ssm_cfg has the unknown d_stat"),
        ({"ssm_cfg": None}, "ssm_cfg is None, wanted an object"),
        ({"d_model": "768"}, "d_model is '768', not an integer"),
    ],
)
def test_models_that_are_not_known(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **changes}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"selective": ("dt", "B")},
        {"block": "h3"},
        {"A_init": "s4d-lin"},
        {"norm_epsilon": 1e-6},
        {"mixer_norm_epsilon": 1e-6},
    ],
)
def test_models_without_a_word_in_the_format(tmp_path, fields):
    with pytest.raises(ConfigError, match=r"the format 'official' has no model with"):
        save_model(make_model(**fields), tmp_path / "out", "official")
    assert not (tmp_path / "out").exists()


def test_an_argument_without_effect_is_left_out():
    config = LAYOUT.read({**PUBLISHED, "ssm_cfg": {"use_fast_path": False, "d_state": 8}})
    assert config == MambaConfig(d_state=8)
