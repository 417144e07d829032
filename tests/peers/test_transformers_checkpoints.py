"""Checkpoints of transformers opened here, and ours there: the same logits and the same greedy tokens."""

from __future__ import annotations

import pytest
import torch

from mambakit.models import MambaConfig, MambaLanguageModel, load_model

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # The peer's own, of which it has many.

CLASSES = {
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
}
VARIANTS = {
    "default": {},
    "untied": {"tie_word_embeddings": False},
    "odd sizes": {"hidden_size": 24, "state_size": 5, "conv_kernel": 3, "expand": 3, "time_step_rank": 7},
    "biases": {"use_bias": True, "use_conv_bias": False, "layer_norm_epsilon": 1e-2},
}  # fmt: skip
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def make_peer(kind, **fields):
    """A model of transformers, with weights that differ from their initial values."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 96, "state_size": 8}
    config, model = CLASSES[kind]
    peer = model(config(**{**sizes, **fields})).eval()
    for parameter in peer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return peer


def assert_same(model, peer):
    tokens = torch.randint(0, 96, (2, 33))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0], peer(tokens).logits, **TOLERANCE)
    prompt = tokens[:1, :12]
    expected = peer.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    found = model.generate(prompt.tolist(), max_tokens=20, temperature=0)
    assert found == [expected[0, 12:].tolist()]


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", CLASSES)
def test_saved_by_them_and_opened_by_us(tmp_path, kind, fields):
    peer = make_peer(kind, **fields)
    peer.save_pretrained(tmp_path)
    assert_same(load_model(tmp_path), peer)


@pytest.mark.parametrize("kind", CLASSES)
def test_saved_by_them_in_shards(tmp_path, kind):
    peer = make_peer(kind)
    peer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    assert_same(load_model(tmp_path), peer)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", CLASSES)
def test_saved_by_us_and_opened_by_them(tmp_path, kind, fields):
    theirs = make_peer(kind, **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", "huggingface")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(peer) is type(theirs)
    assert_same(model, peer.eval())
    for name, parameter in theirs.named_parameters():
        assert peer.get_parameter(name).equal(parameter), name


@pytest.mark.parametrize("kind", CLASSES)
def test_a_padded_vocabulary(tmp_path, kind):
    epsilon = 1e-5 if kind == "falcon_mamba" else None
    config = MambaConfig(d_model=32, n_layer=2, vocab_size=93, mixer_norm_epsilon=epsilon)
    model = MambaLanguageModel(config)
    model.save_pretrained(tmp_path, "huggingface")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, 93, (2, 17))
    with torch.no_grad():
        logits = peer(tokens).logits
        assert logits.shape[-1] == 96
        torch.testing.assert_close(model(tokens)[0], logits, **TOLERANCE)


@pytest.mark.parametrize("kind", CLASSES)
def test_half_precision(tmp_path, kind):
    peer = make_peer(kind).bfloat16()
    peer.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.equal(peer.lm_head.weight)
    model.save_pretrained(tmp_path / "ours", "huggingface")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert back.dtype == torch.bfloat16
    assert back.lm_head.weight.equal(peer.lm_head.weight)


def test_gradients_of_falcon_mamba(tmp_path):
    peer = make_peer("falcon_mamba", mixer_rms_eps=1e-3)
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.config.mixer_norm_epsilon == 1e-3
    tokens = torch.randint(0, 96, (2, 17))
    peer.train()(tokens, labels=tokens).loss.backward()
    model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
    ours = dict(model.named_parameters())
    for name, parameter in peer.named_parameters():
        gradient = ours[name.replace("embeddings", "embedding")].grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
