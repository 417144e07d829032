from __future__ import annotations

import json
import sys

import gguf
import numpy as np
import pytest
import torch

from mambakit.data import load_tokenizer
from mambakit.errors import ConfigError, MambakitError
from mambakit.models import MambaConfig, MambaLanguageModel, load_model, save_model


def make_model(**fields) -> MambaLanguageModel:
    fields = {"d_model": 16, "n_layer": 2, "vocab_size": 50, "d_state": 5, "dt_rank": 3, **fields}
    return MambaLanguageModel(MambaConfig(**fields))


def read(model, folder, tokenizer=None) -> gguf.GGUFReader:
    save_model(model, folder, "gguf", tokenizer)
    assert [path.name for path in folder.iterdir()] == ["model.gguf"]
    return gguf.GGUFReader(folder / "model.gguf")


def value(reader, key):
    return reader.get_field(key).contents()


def test_sizes(tmp_path):
    reader = read(make_model(norm_epsilon=1e-3), tmp_path)
    assert value(reader, "general.architecture") == "mamba"
    sizes = {
        "embedding_length": 16, "block_count": 2, "context_length": 2**20, "feed_forward_length": 0,
        "attention.head_count": 0, "ssm.conv_kernel": 4, "ssm.inner_size": 32, "ssm.state_size": 5,
        "ssm.time_step_rank": 3, "ssm.dt_b_c_rms": False, "vocab_size": 56,
    }  # fmt: skip
    assert {key: value(reader, f"mamba.{key}") for key in sizes} == sizes
    assert value(reader, "mamba.attention.layer_norm_rms_epsilon") == np.float32(1e-3)
    assert value(reader, "tokenizer.ggml.model") == "no_vocab"
    assert value(reader, "general.file_type") == gguf.LlamaFileType.ALL_F32


@pytest.mark.parametrize("tied", [True, False])
def test_tensors(tmp_path, tied):
    model = make_model(tie_embeddings=tied)
    tensors = {tensor.name: tensor for tensor in read(model, tmp_path).tensors}
    weights = model.state_dict()
    names = {
        "token_embd.weight": "backbone.embedding.weight",
        "output_norm.weight": "backbone.norm_f.weight",
        **({} if tied else {"output.weight": "lm_head.weight"}),
    }
    for i in range(2):
        names |= {
            f"blk.{i}.{theirs}": f"backbone.layers.{i}.{ours}"
            for theirs, ours in {
                "attn_norm.weight": "norm.weight",
                "ssm_in.weight": "mixer.in_proj.weight",
                "ssm_conv1d.weight": "mixer.conv1d.weight",
                "ssm_conv1d.bias": "mixer.conv1d.bias",
                "ssm_x.weight": "mixer.x_proj.weight",
                "ssm_dt.weight": "mixer.dt_proj.weight",
                "ssm_dt.bias": "mixer.dt_proj.bias",
                "ssm_a": "mixer.A_log",
                "ssm_d": "mixer.D",
                "ssm_out.weight": "mixer.out_proj.weight",
            }.items()
        }
    assert tensors.keys() == names.keys()
    for theirs, ours in names.items():
        expected = weights[ours].numpy()
        if theirs.endswith("ssm_a"):
            expected = -np.exp(expected)
        if theirs.endswith("ssm_conv1d.weight"):
            expected = expected[:, 0]
        assert tensors[theirs].tensor_type == gguf.GGMLQuantizationType.F32
        np.testing.assert_allclose(tensors[theirs].data, expected, rtol=1e-6, err_msg=theirs)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_half_precision_is_for_matrices(tmp_path, dtype, kind):
    model = make_model().to(dtype)
    reader = read(model, tmp_path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    halves = {"token_embd.weight"} | {
        f"blk.{i}.{name}.weight"
        for i in (0, 1)
        for name in ("ssm_in", "ssm_x", "ssm_dt", "ssm_out")
    }
    assert {name for name, found in kinds.items() if found == kind} == halves
    assert {found for name, found in kinds.items() if name not in halves} == {"F32"}
    assert value(reader, "general.file_type") == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    (tensor,) = (t for t in reader.tensors if t.name == "blk.1.ssm_in.weight")
    assert tensor.shape.tolist() == [16, 64]
    found = torch.frombuffer(bytearray(tensor.data.tobytes()), dtype=dtype).view(64, 16)
    assert found.equal(model.backbone.layers[1].mixer.in_proj.weight)


def test_bytes(tmp_path):
    reader = read(make_model(vocab_size=257), tmp_path, load_tokenizer("bytes"))
    assert value(reader, "tokenizer.ggml.model") == "rwkv"
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == 264
    assert tokens[10] == r"\x0a"
    assert tokens[255:258] == [r"\xff", "<|endoftext|>", "[PAD257]"]
    kinds = value(reader, "tokenizer.ggml.token_type")
    assert kinds[255:258] == [1, 3, 5]
    assert value(reader, "tokenizer.ggml.eos_token_id") == 256


BPE = {
    "added_tokens": [
        {"id": 0, "content": "<|endoftext|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False},
        {"id": 5, "content": "  ", "special": False, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": True},
    ],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}, "merges": [["a", "b"]]},
}  # fmt: skip


def tokenizer_of(folder, **changes):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**BPE, **changes}), encoding="utf-8")
    return load_tokenizer(path)


@pytest.mark.parametrize("merges", [[["a", "b"]], ["a b"]])
def test_bpe(tmp_path, merges):
    tokenizer = tokenizer_of(tmp_path, model={**BPE["model"], "merges": merges})
    reader = read(make_model(vocab_size=7, pad_vocab_size_multiple=1), tmp_path / "out", tokenizer)
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert tokens == ["<|endoftext|>", "a", "b", "c", "ab", "  ", "[PAD6]"]
    assert value(reader, "tokenizer.ggml.token_type") == [3, 1, 1, 1, 1, 4, 5]
    assert value(reader, "tokenizer.ggml.merges") == ["a b"]
    assert value(reader, "tokenizer.ggml.eos_token_id") == 0
    assert value(reader, "tokenizer.ggml.add_bos_token") is False


FALCON = [
    {"type": "Punctuation", "behavior": "Contiguous"},
    BPE["pre_tokenizer"],
    {"type": "Digits", "individual_digits": False},
    {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
]  # fmt: skip


def test_the_split_of_falcon(tmp_path):
    split = {"type": "Sequence", "pretokenizers": FALCON}
    reader = read(make_model(), tmp_path / "out", tokenizer_of(tmp_path, pre_tokenizer=split))
    assert value(reader, "tokenizer.ggml.pre") == "falcon"


@pytest.mark.parametrize(
    "steps",
    [
        [{**BPE["pre_tokenizer"], "use_regex": False}],
        [{**BPE["pre_tokenizer"], "add_prefix_space": True}],
        FALCON[:3],
        [*FALCON[:3], {**FALCON[3], "pattern": {"Regex": "[0-9]"}}],
    ],
)
def test_a_split_that_differs_a_little(tmp_path, steps):
    split = {"type": "Sequence", "pretokenizers": steps}
    with pytest.raises(ConfigError, match="nothing known here for BPE after"):
        save_model(make_model(), tmp_path, "gguf", tokenizer_of(tmp_path, pre_tokenizer=split))


def test_tokenizers_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"has ids up to 5, wanted below 4"):
        save_model(
            make_model(vocab_size=4, pad_vocab_size_multiple=1),
            tmp_path,
            "gguf",
            tokenizer_of(tmp_path),
        )
    split = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    other = tokenizer_of(tmp_path, pre_tokenizer=split)
    with pytest.raises(ConfigError, match="nothing known here for BPE after Metaspace; leave"):
        save_model(make_model(), tmp_path, "gguf", other)
    none = tokenizer_of(tmp_path, pre_tokenizer=None)
    with pytest.raises(ConfigError, match="nothing known here for BPE after no split"):
        save_model(make_model(), tmp_path, "gguf", none)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    "fields",
    [{"expand": 3}, {"bias": True}, {"conv_bias": False}, {"selective": ("dt",)}, {"A_init": "s4d-lin"}, {"block": "h3"}],
)  # fmt: skip
def test_models_that_llama_cpp_does_not_have(tmp_path, fields):
    with pytest.raises(ConfigError, match=r"the format 'gguf' has no model with"):
        save_model(make_model(**fields), tmp_path, "gguf")


def test_norms_in_the_mixer(tmp_path):
    reader = read(make_model(mixer_norm_epsilon=1e-5), tmp_path / "equal")
    assert value(reader, "mamba.ssm.dt_b_c_rms") is True
    with pytest.warns(UserWarning, match="its results will differ a little"):
        save_model(make_model(mixer_norm_epsilon=1e-6), tmp_path / "other", "gguf")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        MambakitError, match=r"needs the package gguf; pip install mambakit\[gguf\]"
    ):
        save_model(make_model(), tmp_path, "gguf")


def test_it_is_not_read(tmp_path):
    save_model(make_model(), tmp_path, "gguf")
    with pytest.raises(MambakitError, match=r"has no config\.json"):
        load_model(tmp_path)
