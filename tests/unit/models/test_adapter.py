from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambakit.errors import ArgumentError, CheckpointError, ConfigError, MambakitError
from mambakit.models import (
    MambaConfig,
    MambaLanguageModel,
    Quantisation,
    load_model,
    quantise,
    read_config,
    save_model,
)
from mambakit.models.adapter import CONFIG, WEIGHTS, Adapter, base_of, fingerprint, is_adapter
from mambakit.models.checkpoint import base_folder, read_quantisation

peft = pytest.importorskip("peft")

TARGETS = ("in_proj", "x_proj", "dt_proj", "out_proj")


def make_model(**fields: Any) -> MambaLanguageModel:
    torch.manual_seed(0)
    return MambaLanguageModel(
        MambaConfig(**{"d_model": 16, "n_layer": 2, "vocab_size": 40, **fields})
    )


def adapt(model: MambaLanguageModel, **options: Any) -> Adapter:
    """One with values that are not those of the start."""
    options = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": TARGETS, **options}
    adapter = Adapter.new(model, **options)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    return adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(make_model(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Path:
    """An adapter, in a folder of its own."""
    (tmp_path / "adapter").mkdir()
    adapt(load_model(base)).save(tmp_path / "adapter")
    return tmp_path / "adapter"


TOKENS = torch.arange(18).view(2, 9)


def test_a_new_adapter_changes_nothing_and_freezes_all_else() -> None:
    model = make_model()
    expected, _ = model(TOKENS)
    before = model.num_parameters()
    Adapter.new(model, rank=4, alpha=8.0, dropout=0.0, targets=["x_proj", "dt_proj"])
    assert torch.equal(model(TOKENS)[0], expected)
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 2 * 2
    # d_inner 32, dt_rank 1, d_state 16
    assert model.num_parameters() - before == 2 * 4 * ((32 + 33) + (1 + 32))


def test_merging_gives_the_same_model_that_can_be_trained() -> None:
    model = make_model()
    adapter = adapt(model)
    expected, _ = model(TOKENS)
    adapter.merge()
    torch.testing.assert_close(model(TOKENS)[0], expected, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == make_model().state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.backbone.embedding.weight


def test_alpha_and_rank_are_a_factor() -> None:
    outputs = []
    for alpha, factor in ((6.0, 2), (12.0, 1)):
        model = make_model()
        adapt(model, alpha=alpha)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= factor
        outputs.append(model(TOKENS)[0])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "expected", "tolerance"),
    [(None, torch.float32, 1e-5), (torch.bfloat16, torch.bfloat16, 0.05)],
)
def test_load_model_merges(
    base: Path, saved: Path, dtype: torch.dtype | None, expected: torch.dtype, tolerance: float
) -> None:
    content = (base / "model.safetensors").read_bytes()
    whole = load_model(base)
    adapt(whole)
    model = load_model(saved, dtype=dtype)
    assert model.lm_head.weight.dtype == expected
    assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32
    logits = model(TOKENS)[0].float()
    torch.testing.assert_close(logits, whole(TOKENS)[0], rtol=tolerance, atol=tolerance)
    assert (base / "model.safetensors").read_bytes() == content
    assert model.name_or_path == str(saved)
    assert read_config(saved) == MambaConfig.from_pretrained(saved) == whole.config
    assert read_quantisation(saved) is None


def test_a_base_in_half_precision_is_merged_in_float32(base: Path, tmp_path: Path) -> None:
    save_model(load_model(base).bfloat16(), base)
    model = load_model(base, dtype=torch.float32)
    adapter = adapt(model)
    (tmp_path / "adapter").mkdir()
    adapter.save(tmp_path / "adapter")
    adapter.merge()
    loaded = load_model(tmp_path / "adapter")
    for (name, one), other in zip(
        model.bfloat16().state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


def test_an_adapter_of_an_adapter(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved)
    adapter = adapt(model, targets=["out_proj"])
    (tmp_path / "second").mkdir()
    adapter.save(tmp_path / "second")
    assert base_of(tmp_path / "second") == str(saved)
    assert base_folder(tmp_path / "second") == tmp_path / "base"
    logits, _ = load_model(tmp_path / "second")(TOKENS)
    torch.testing.assert_close(logits, model(TOKENS)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:unclosed file")  # Peft leaves the config open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_peft_opens_what_is_saved(base: Path, saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text(encoding="utf-8"))
    assert config["r"] == 3
    assert config["target_modules"] == sorted(TARGETS)
    assert config["base_model_name_or_path"] == str(base)
    whole = load_model(base)
    adapt(whole)
    opened = peft.PeftModel.from_pretrained(load_model(base), str(saved))
    assert torch.equal(opened(TOKENS)[0], whole(TOKENS)[0])


def test_the_folder_and_what_it_is(base: Path, saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]
    assert is_adapter(saved)
    assert not is_adapter(base)
    assert base_folder(base) == base
    (base / CONFIG).write_text("{}", encoding="utf-8")
    assert not is_adapter(base)  # What is beside a whole model is not asked for.


def test_the_fingerprint_is_that_of_the_values(base: Path) -> None:
    model = load_model(base)
    before = fingerprint(model)
    assert fingerprint(make_model()) == before
    assert fingerprint(load_model(base).double()) == before
    with torch.no_grad():
        model.backbone.layers[1].mixer.out_proj.weight[0, 0] += 1e-3
    assert fingerprint(model) != before


def test_other_weights_in_the_place_of_the_base(base: Path, saved: Path) -> None:
    torch.manual_seed(7)
    save_model(MambaLanguageModel(read_config(base)), base)
    with pytest.raises(CheckpointError) as caught:
        load_model(saved)
    assert f"{saved} was trained on other weights than those in {base}; put" in str(caught.value)


def test_the_base_is_gone(base: Path, saved: Path) -> None:
    base.rename(base.with_name("moved"))
    with pytest.raises(CheckpointError, match="is an adapter of .*base, which cannot be opened: "):
        load_model(saved)


def edit(folder: Path, **fields: Any) -> None:
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**values, **fields}), encoding="utf-8")


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[next(name for name in tensors if "layers.1.mixer.x_proj.lora_A" in name)]
    save_file(tensors, folder / WEIGHTS)


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:300])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit(folder, base_model_name_or_path=None), "does not say which model"),
        (lambda folder: edit(folder, base_model_name_or_path=str(folder)), "does not say which"),
        (lambda folder: edit(folder, peft_type="IA3"), "of the kind IA3, wanted LORA"),
        (lambda folder: edit(folder, target_modules=["q_proj"]), "does not fit its base: .*q_proj"),
        (lambda folder: edit(folder, r=4), "layers.0-1.mixer.in_proj.lora_A.weight.*of another shape"),
        (lambda folder: (folder / CONFIG).write_text("[1]"), "is no JSON object"),
        (lambda folder: (folder / CONFIG).write_text("{"), "cannot be read"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lose_a_tensor, "layers.1.mixer.x_proj.lora_A.weight missing, unknown or"),
        (cut, "is damaged or cut off"),
    ],
)  # fmt: skip
def test_damaged_adapters(saved: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


def test_none_of_the_layers_is_there() -> None:
    with pytest.raises(ConfigError, match="adapter: .*x_proj.* not found"):
        adapt(make_model(selective=()), targets=["x_proj"])


def test_a_quantised_base(base: Path, saved: Path) -> None:
    model = load_model(base)
    quantise(model, Quantisation(bits=8))
    with pytest.raises(ConfigError, match="is quantised to 8 bits, which cannot be merged"):
        adapt(model)
    save_model(model, base)
    with pytest.raises(CheckpointError, match="does not fit its base: .* 8 bits"):
        load_model(saved)


def test_one_matrix_for_embedding_and_head(saved: Path) -> None:
    with pytest.raises(ArgumentError, match="one matrix for both"):
        adapt(make_model(), targets=["lm_head"]).merge()
    model = make_model(tie_embeddings=False)
    adapter = adapt(model, targets=["lm_head"])
    expected, _ = model(TOKENS)
    adapter.merge()
    torch.testing.assert_close(model(TOKENS)[0], expected, rtol=1e-5, atol=1e-5)


def test_without_peft(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MambakitError, match=r"need the package peft; pip install mambakit\[lora\]"):
        load_model(saved)
