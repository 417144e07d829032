from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from mambakit.compat.mamba_ssm.models.config_mamba import MambaConfig
from mambakit.compat.mamba_ssm.models.mixer_seq_simple import (
    MambaLMHeadModel,
    MixerModel,
    create_block,
)
from mambakit.compat.mamba_ssm.modules.block import Block
from mambakit.compat.mamba_ssm.modules.mamba_simple import Mamba
from mambakit.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm
from mambakit.compat.mamba_ssm.utils.generation import InferenceParams
from mambakit.compat.mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from mambakit.errors import CheckpointError, ConfigError
from mambakit.models import MambaConfig as OurConfig
from mambakit.models import MambaLanguageModel, load_model

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
SMALL = {"d_model": 16, "n_layer": 2, "vocab_size": 29}


def make_model(**fields) -> MambaLMHeadModel:
    model = MambaLMHeadModel(MambaConfig(**{**SMALL, **fields}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def our_logits(model, tokens):
    """By our own model with the same weights."""
    ours = MambaLanguageModel(OurConfig(**SMALL))
    ours.load_state_dict(model.state_dict())
    return ours(tokens)[0]


@pytest.mark.parametrize("fused_add_norm", [False, True])
def test_same_logits_as_our_model(fused_add_norm):
    model, tokens = make_model(fused_add_norm=fused_add_norm), torch.randint(0, 29, (2, 13))
    logits = model(tokens).logits
    assert logits.shape == (2, 13, 32)
    torch.testing.assert_close(logits, our_logits(model, tokens), **TOLERANCE)
    torch.testing.assert_close(model(tokens, num_last_tokens=3).logits, logits[:, -3:], **TOLERANCE)


@pytest.mark.parametrize("rms_norm", [False, True])
@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_caches(rms_norm, residual_in_fp32):
    model = make_model(rms_norm=rms_norm, residual_in_fp32=residual_in_fp32)
    tokens = torch.randint(0, 29, (2, 9))
    expected = model(tokens).logits
    cache = model.allocate_inference_cache(2, 9)
    assert [*cache] == [0, 1]
    params = InferenceParams(9, 2, key_value_memory_dict=cache)
    found = []
    with torch.no_grad():
        for part in tokens.split([3, 1, 5], dim=1):
            found.append(model(part, inference_params=params).logits)
            params.seqlen_offset += part.shape[1]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **TOLERANCE)


def test_layer_norm_model_is_what_its_equations_say():
    model, tokens = make_model(rms_norm=False), torch.randint(0, 29, (1, 7))
    backbone = model.backbone
    stream = backbone.embedding(tokens)
    for layer in backbone.layers:
        stream = stream + layer.mixer(layer.norm(stream))
    assert isinstance(backbone.norm_f, nn.LayerNorm)
    torch.testing.assert_close(backbone(tokens), backbone.norm_f(stream), **TOLERANCE)


def test_mixer_model_alone():
    model = MixerModel(8, 2, 0, 10, rms_norm=True, ssm_cfg={"d_state": 3})
    assert model.layers[1].mixer.layer_idx == 1
    assert model.layers[0].mixer.d_state == 3
    assert isinstance(model.norm_f, RMSNorm)
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 8)


def test_create_block():
    block = create_block(
        8, 0, ssm_cfg={"d_conv": 2, "layer": "Mamba1"}, norm_epsilon=0.1, layer_idx=5
    )
    assert isinstance(block, Block)
    assert isinstance(block.mixer, Mamba)
    assert (block.mixer.d_conv, block.norm.eps, block.layer_idx) == (2, 0.1, 5)
    hidden = torch.randn(1, 3, 8)
    out, residual = block(hidden)
    torch.testing.assert_close(residual, hidden)
    torch.testing.assert_close(out, block.mixer(block.norm(hidden)), **TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_intermediate": 8}, "d_intermediate: got 8, wanted 0"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.*got 'Mamba2', wanted 'Mamba1'"),
        ({"attn_layer_idx": [1], "layer_idx": 1}, "attn_layer_idx: got True"),
    ],
)
def test_what_is_no_mamba_1(arguments, message):
    with pytest.raises(ConfigError, match=message):
        create_block(8, **arguments)


def test_a_block_of_other_parts():
    """What Vision Mamba and others make of `Block`."""
    block = Block(8, Mamba, nn.Identity, nn.LayerNorm, residual_in_fp32=True)
    with_mlp = Block(8, Mamba, lambda dim: nn.Linear(dim, dim))
    hidden, residual = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    out, stream = block(hidden, residual)
    torch.testing.assert_close(stream, hidden + residual)
    torch.testing.assert_close(out, block.mixer(block.norm(stream)), **TOLERANCE)
    out, stream = with_mlp(hidden, residual)
    between = hidden + residual
    between = between + with_mlp.mixer(with_mlp.norm(between))
    torch.testing.assert_close(stream, between, **TOLERANCE)
    torch.testing.assert_close(out, with_mlp.mlp(with_mlp.norm2(between)), **TOLERANCE)


class Scale(nn.Module):
    """A norm of somebody else."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 2.0))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("wide", [False, True])
def test_a_norm_of_somebody_else(wide):
    block = Block(8, Mamba, nn.Identity, Scale, residual_in_fp32=wide)
    hidden = torch.randn(1, 3, 8)
    out, stream = block(hidden, hidden)
    torch.testing.assert_close(stream, 2 * hidden)
    torch.testing.assert_close(out, block.mixer(4 * hidden), **TOLERANCE)


def test_initial_values():
    torch.manual_seed(0)
    model = MambaLMHeadModel(
        MambaConfig(d_model=64, n_layer=4, vocab_size=99, ssm_cfg={"bias": True}),
        initializer_cfg={"initializer_range": 0.5},
    )
    assert abs(model.backbone.embedding.weight.std() - 0.5) < 0.05
    assert model.lm_head.weight is model.backbone.embedding.weight
    for layer in model.backbone.layers:
        assert not layer.mixer.in_proj.bias.any()
        assert layer.mixer.dt_proj.bias.abs().min() > 1
        bound = 1 / math.sqrt(128) / math.sqrt(4)
        assert 0.9 * bound < layer.mixer.out_proj.weight.abs().max() <= bound
    plain = {"rescale_prenorm_residual": False}
    model = MambaLMHeadModel(MambaConfig(**SMALL, tie_embeddings=False), initializer_cfg=plain)
    assert model.backbone.layers[0].mixer.out_proj.weight.abs().max() > 0.9 / math.sqrt(32)
    assert model.lm_head.weight is not model.backbone.embedding.weight


def test_saved_by_it_and_opened_by_it_and_by_us(tmp_path):
    model, tokens = make_model(), torch.randint(0, 29, (1, 8))
    model.save_pretrained(tmp_path)
    assert {*json.loads((tmp_path / "config.json").read_text())} == {
        field.name for field in dataclasses.fields(MambaConfig)
    }
    again = MambaLMHeadModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.lm_head.weight is again.backbone.embedding.weight
    assert torch.equal(again.eval()(tokens).logits, model(tokens).logits)
    torch.testing.assert_close(load_model(tmp_path)(tokens)[0], model(tokens).logits, **TOLERANCE)


@pytest.mark.parametrize("fields", [{"rms_norm": False}, {"tie_embeddings": False}])
def test_other_models_are_saved_and_opened_too(tmp_path, fields):
    model, tokens = make_model(**fields), torch.randint(0, 29, (1, 8))
    model.save_pretrained(tmp_path)
    again = MambaLMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("format", ["mambakit", "official", "huggingface"])
def test_opens_every_format(tmp_path, format):
    ours = MambaLanguageModel(OurConfig(**SMALL))
    ours.save_pretrained(tmp_path, format)
    model, tokens = MambaLMHeadModel.from_pretrained(tmp_path), torch.randint(0, 29, (1, 8))
    torch.testing.assert_close(model(tokens).logits, ours(tokens)[0], **TOLERANCE)
    assert load_config_hf(tmp_path)["d_model"] == 16
    assert {*load_state_dict_hf(tmp_path)} >= {"backbone.embedding.weight"}
    half = load_state_dict_hf(tmp_path, device="cpu", dtype=torch.float16)
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


def test_dtype_of_an_opened_model(tmp_path):
    make_model().bfloat16().save_pretrained(tmp_path)
    assert MambaLMHeadModel.from_pretrained(tmp_path).lm_head.weight.dtype == torch.float32
    model = MambaLMHeadModel.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16)
    mixer = model.backbone.layers[0].mixer
    assert model.lm_head.weight.dtype == mixer.in_proj.weight.dtype == torch.bfloat16
    assert mixer.A_log.dtype == mixer.dt_proj.bias.dtype == torch.float32
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16


def test_bad_checkpoints(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "n_layer": 3}))
    with pytest.raises(CheckpointError, match=r"backbone\.layers\.2\.mixer"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    config.write_text(json.dumps({**fields, "n_head": 3}))
    with pytest.raises(CheckpointError, match="config.json has the unknown n_head"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        MambaLMHeadModel.from_pretrained(tmp_path / "nowhere")
