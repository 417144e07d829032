from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from mambakit.data import load_tokenizer
from mambakit.errors import CheckpointError, ConfigError
from mambakit.models import MambaConfig, MambaLanguageModel, load_model, save_model
from mambakit.models.formats.huggingface import LAYOUT

MAMBA = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536, "d_model": 768,
    "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768,
    "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
    "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16,
    "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
    "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32", "use_bias": False, "use_cache": True,
    "use_conv_bias": True, "vocab_size": 50280,
}  # fmt: skip
"""config.json of the released model of 130M for transformers."""

FALCON = {
    "model_type": "falcon_mamba", "expand": 16, "intermediate_size": 8192, "hidden_size": 4096, "conv_kernel": 4,
    "num_hidden_layers": 64, "state_size": 16, "time_step_rank": 256, "tie_word_embeddings": False,
    "vocab_size": 65024, "hidden_act": "silu", "layer_norm_epsilon": 1e-05,
}  # fmt: skip
"""What matters of FalconMamba 7B: expand has no effect there, intermediate_size has."""


def make_model(**fields) -> MambaLanguageModel:
    return MambaLanguageModel(
        MambaConfig(**{"d_model": 16, "n_layer": 2, "vocab_size": 50, **fields})
    )


def description_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_published_configs():
    assert LAYOUT.recognises(MAMBA)
    expected = MambaConfig(vocab_size=50280, pad_vocab_size_multiple=1, dt_rank=48)
    assert LAYOUT.read(MAMBA) == expected
    assert LAYOUT.read(MAMBA).num_parameters() == 129_135_360
    assert LAYOUT.recognises(FALCON)
    config = LAYOUT.read(FALCON)
    assert (config.d_inner, config.mixer_norm_epsilon) == (8192, 1e-6)
    assert config.num_parameters() == 7_272_665_088  # 7.27 B, as its authors say


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_embeddings": False, "bias": True, "conv_bias": False, "residual_in_fp32": False},
        {"d_state": 5, "d_conv": 3, "expand": 3, "norm_epsilon": 1e-3, "dt_init": "constant"},
        {"mixer_norm_epsilon": 1e-4},
    ],
)
def test_round_trip(tmp_path, fields):
    model = make_model(**{"dt_rank": 4, "vocab_size": 56, "pad_vocab_size_multiple": 1, **fields})
    save_model(model, tmp_path, "huggingface")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor), name
    kind = "falcon_mamba" if "mixer_norm_epsilon" in fields else "mamba"
    assert description_of(tmp_path)["model_type"] == kind


def test_padding_is_part_of_the_vocabulary(tmp_path):
    save_model(make_model(vocab_size=50), tmp_path, "huggingface")
    assert description_of(tmp_path)["vocab_size"] == 56
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["backbone.embeddings.weight"].shape == (56, 16)
    assert "lm_head.weight" not in weights  # it is tied
    assert load_model(tmp_path).config.vocab_size == 56


def test_both_names_of_the_embedding_are_known(tmp_path):
    model = make_model()
    save_model(model, tmp_path, "huggingface")
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    save_file(weights, path)
    assert load_model(tmp_path).lm_head.weight.equal(model.lm_head.weight)


def test_ids_that_end_a_text(tmp_path):
    save_model(make_model(), tmp_path / "none", "huggingface")
    assert description_of(tmp_path / "none")["eos_token_id"] is None
    model = make_model(vocab_size=257)
    save_model(model, tmp_path / "bytes", "huggingface", load_tokenizer("bytes"))
    assert description_of(tmp_path / "bytes")["eos_token_id"] == 256
    assert load_tokenizer(tmp_path / "bytes").eos_id == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', wanted 'silu'"),
        ({"intermediate_size": 1000}, "intermediate_size is 1000, wanted a multiple of 768"),
        ({"hidden_size": None}, "d_model is None, not an integer"),
        ({"model_type": "mamba2"}, r"is of another program \(mamba2\)"),
    ],
)
def test_models_that_are_not_known(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps({**MAMBA, **changes}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_config_without_sizes(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="has no hidden_size, num_hidden_layers, vocab_size"):
        load_model(tmp_path)


def test_what_is_left_out_has_the_defaults():
    sizes = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    expected = MambaConfig(d_model=8, n_layer=1, vocab_size=9, pad_vocab_size_multiple=1)
    assert LAYOUT.read(sizes) == expected
    assert LAYOUT.read({**sizes, "expand": 3}).d_inner == 24


@pytest.mark.parametrize(
    "fields", [{"selective": ("dt",)}, {"A_init": "s4d-lin"}, {"block": "ungated"}]
)
def test_models_without_a_word_in_the_format(tmp_path, fields):
    with pytest.raises(ConfigError, match=r"the format 'huggingface' has no model with"):
        save_model(make_model(**fields), tmp_path, "huggingface")
