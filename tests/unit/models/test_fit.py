from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambakit.errors import CheckpointError
from mambakit.models import MambaConfig, MambaLanguageModel, load_model, save_model
from mambakit.models.fit import joined


def make_model(**fields) -> MambaLanguageModel:
    torch.manual_seed(0)
    return MambaLanguageModel(
        MambaConfig(**{"d_model": 16, "n_layer": 4, "vocab_size": 56, **fields})
    )


def edit_weights(folder, edit) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


def test_everything_that_does_not_fit_is_named_at_once(tmp_path):
    save_model(make_model(tie_embeddings=False), tmp_path, "huggingface")

    def damage(weights: dict[str, torch.Tensor]) -> None:
        del weights["backbone.layers.0.mixer.D"], weights["backbone.layers.1.mixer.D"]
        del weights["backbone.layers.3.mixer.D"], weights["lm_head.weight"]
        del weights["backbone.embeddings.weight"]
        weights["backbone.layers.2.mixer.A"], weights["other"] = torch.ones(3), torch.ones(3)
        for layer in (1, 2):
            weights[f"backbone.layers.{layer}.mixer.in_proj.weight"] = torch.ones(64, 8)
        weights["backbone.norm_f.weight"] = torch.ones(16, dtype=torch.int8)
        weights["backbone.layers.0.norm.weight"] = torch.ones(16, 1)

    edit_weights(tmp_path, damage)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} does not fit its config.json: it lacks backbone.embeddings.weight, "
        "backbone.layers.0-1,3.mixer.D, lm_head.weight; it has the unknown backbone.layers.2.mixer.A, other; "
        "backbone.layers.0.norm.weight: got shape (16, 1), wanted (16,); "
        "backbone.layers.1-2.mixer.in_proj.weight: got shape (64, 8), wanted (64, 16); "
        "backbone.norm_f.weight: got dtype torch.int8, wanted a float of 16, 32 or 64 bits"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_state": 8}, r"layers\.0-3\.mixer\.A_log: got shape \(32, 16\), wanted \(32, 8\)"),
        (
            {"n_layer": 3},
            r"it has the unknown backbone\.layers\.3\.mixer\.A_log, .*\.3\.norm\.weight$",
        ),
        ({"conv_bias": False}, r"it has the unknown backbone\.layers\.0-3\.mixer\.conv1d\.bias$"),
        ({"vocab_size": 60}, r"embedding\.weight: got shape \(56, 16\), wanted \(64, 16\)"),
    ],
)
def test_a_config_that_contradicts_the_weights(tmp_path, fields, message):
    save_model(make_model(), tmp_path)
    path = tmp_path / "config.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    description["model"] |= fields
    path.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path):
    model = make_model()
    save_model(model, tmp_path, "huggingface")
    head = model.lm_head.weight.detach().clone()
    edit_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": head}))
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.backbone.embedding.weight
    head[5, 3] += 1
    edit_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": head}))
    with pytest.raises(
        CheckpointError,
        match=r"tied to the embedding, but lm_head\.weight is not backbone\.embeddings",
    ):
        load_model(tmp_path)


def test_a_tensor_that_is_there_twice(tmp_path):
    save_model(make_model(), tmp_path, "huggingface")
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    other = {"backbone.embedding.weight": weights["backbone.embeddings.weight"]}
    path.rename(tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"json: it has backbone\.embeddings\.weight twice$"):
        load_model(tmp_path)


def test_names_in_a_line():
    assert joined([]) == ""
    assert joined(["a", "layers.b"]) == "a, layers.b"
    names = [f"x.layers.{i}.y" for i in (11, 2, 3, 10, 5)]
    assert joined(["z", *names, "x.layers.2.w"]) == "z, x.layers.2-3,5,10-11.y, x.layers.2.w"
