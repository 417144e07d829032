from __future__ import annotations

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambakit.data import load_tokenizer
from mambakit.errors import ArgumentError, CheckpointError, MambakitError
from mambakit.models import MambaConfig, MambaLanguageModel, load_model, read_config, save_model
from mambakit.models import weights as weights_module


def make_model(**fields) -> MambaLanguageModel:
    torch.manual_seed(0)
    fields = {"d_model": 16, "n_layer": 2, "vocab_size": 50, **fields}
    return MambaLanguageModel(MambaConfig(**fields))


@pytest.fixture
def saved(tmp_path):
    save_model(make_model(), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "fields", [{}, {"tie_embeddings": False}, {"selective": ("dt",), "A_init": "s4d-lin"}]
)
def test_round_trip(tmp_path, fields):
    model = make_model(**fields)
    save_model(model, tmp_path / "new" / "folder")
    loaded = load_model(tmp_path / "new" / "folder")
    assert loaded.config == model.config == read_config(tmp_path / "new" / "folder")
    tied = loaded.lm_head.weight is loaded.backbone.embedding.weight
    assert tied == model.config.tie_embeddings
    for (name, tensor), other in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.backbone.layers[0].mixer.A_log._no_weight_decay
    tokens = torch.tensor([[1, 2, 3]])
    # The same weights at other addresses: a matrix product may add in another order.
    torch.testing.assert_close(loaded(tokens)[0], model(tokens)[0])
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip


def test_dtype(tmp_path):
    save_model(make_model().bfloat16(), tmp_path)
    model = load_model(tmp_path)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32
    model = load_model(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.backbone.embedding.weight


def edit(folder, **fields):
    path = folder / "config.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**description, **fields}), encoding="utf-8")


def test_what_the_config_file_says(saved):
    description = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert description["format"] == "mambakit"
    assert description["version"] == 1
    assert description["model"]["d_model"] == 16


def test_no_checkpoint(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"missing is not a checkpoint: it has no config\.json"
    ):
        load_model(tmp_path / "missing")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        read_config(tmp_path / "file")


def test_broken_config(saved):
    (saved / "config.json").write_text('{"format": "mamb', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: .*; restore it"):
        load_model(saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "pt"}, "is of another program"),
        ({"version": 3}, "has version 3, newer than the 2 known here; upgrade mambakit"),
        ({"version": None}, "has version None"),
        ({"model": [1]}, 'has no "model" entry'),
        ({"model": {"d_modl": 16}}, "unknown field 'd_modl'; did you mean 'd_model'"),
        ({"model": {"d_model": -1}}, "d_model is -1"),
    ],
)
def test_configs_that_are_not_ours(saved, fields, message):
    edit(saved, **fields)
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


def test_a_config_that_is_no_object(saved):
    (saved / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is of another program"):
        load_model(saved)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_weights_that_are_cut_off(saved, size):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut off"):
        load_model(saved)


def test_missing_weights_file(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load_model(saved)


def test_weights_of_another_model(saved):
    edit(saved, model=make_model(d_model=32).config.to_dict())
    with pytest.raises(CheckpointError, match=r"got shape \(56, 16\), wanted \(56, 32\)"):
        load_model(saved)
    edit(saved, model=make_model(n_layer=3).config.to_dict())
    with pytest.raises(CheckpointError, match=r"it lacks backbone\.layers\.2"):
        load_model(saved)
    edit(saved, model=make_model(n_layer=1).config.to_dict())
    with pytest.raises(CheckpointError, match=r"it has the unknown backbone\.layers\.1\.\S+, "):
        load_model(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(saved, value):
    path = saved / "model.safetensors"
    weights = load_file(path)
    weights["backbone.layers.1.mixer.D"][3] = value
    save_file(weights, path)
    with pytest.warns(
        UserWarning, match=r"NaN or infinite numbers in backbone\.layers\.1\.mixer\.D;"
    ):
        model = load_model(saved)
    torch.testing.assert_close(
        model.backbone.layers[1].mixer.D[3], torch.tensor(value), equal_nan=True
    )


def test_a_full_disk_leaves_the_old_checkpoint_whole(saved, monkeypatch):
    def full(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(weights_module, "save_file", full)
    with pytest.raises(MambakitError, match="disk is full"):
        save_model(make_model(n_layer=1), saved)
    assert load_model(saved).config.n_layer == 2
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(MambakitError, match="not a folder"):
        save_model(make_model(), tmp_path / "file")


def test_an_unknown_format(tmp_path):
    with pytest.raises(ArgumentError, match="got 'pt', wanted one of mambakit, official, huggingf"):
        save_model(make_model(), tmp_path / "out", "pt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["mambakit", "official", "huggingface"])
@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_of_every_format(tmp_path, format, saved_as, asked):
    model = make_model().to(saved_as)
    save_model(model, tmp_path, format)
    loaded = load_model(tmp_path, dtype=asked)
    expected = model.to(asked or saved_as)
    for name, tensor in expected.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == tensor.dtype, name
        assert found.equal(tensor), name


def test_the_recurrence_is_float32_even_where_it_was_saved_in_bfloat16(saved):
    path = saved / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    model = load_model(saved)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        f"backbone.layers.{i}.mixer.{name}" for i in (0, 1) for name in ("A_log", "D", "dt_proj.bias")
    }  # fmt: skip
    model(torch.tensor([[1, 2]]))


def test_methods_of_the_model(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, "official", load_tokenizer("bytes"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "pytorch_model.bin", "tokenizer.json",
    ]  # fmt: skip
    loaded = MambaLanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.equal(model.lm_head.weight.bfloat16())
