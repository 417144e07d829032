"""The hub, without a network: its cache is laid out by hand, and its address leads nowhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from mambakit.errors import ArgumentError, CheckpointError
from mambakit.models import MambaConfig, MambaLanguageModel, load_model, save_model
from mambakit.models.hub import locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill(cache: Path, format: str) -> Path:
    """Put a model in a cache of the hub, as its client does; gives the folder of the revision."""
    repository = cache / "models--some--mamba"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=1, vocab_size=56))
    save_model(model, repository / "snapshots" / COMMIT, format)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("offline", ["0", "1"])
@pytest.mark.parametrize("format", ["huggingface", "official"])
def test_the_network_is_down_but_the_cache_has_it(tmp_path, format, offline):
    fill(tmp_path / "hub", format)
    code = (
        "from mambakit.models import load_model\n"
        "m = load_model('some/mamba'); print(m.config.d_model, m.name_or_path)"
    )
    environment = {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # Nobody listens there.
        "HF_HUB_OFFLINE": offline,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PATH": "",
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout == "16 some/mamba\n", result.stderr


def test_the_network_is_down_and_the_cache_is_empty(tmp_path):
    code = (
        "from mambakit.models import load_model; from mambakit.errors import CheckpointError\n"
        "try: load_model('some/mamba')\nexcept CheckpointError as error: print(error)"
    )
    environment = {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PATH": "",
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout.startswith(
        "some/mamba is no folder here, and cannot be had from the hub ("
    )
    assert result.stdout.endswith("); check the name and the network\n")


class Hub:
    """What `snapshot_download` has to do, with a folder as the repository."""

    def __init__(self, repository: Path, local: Path):
        self.repository, self.local, self.asked = repository, local, []

    def __call__(self, name, *, revision, allow_patterns):
        self.asked.append((name, revision))
        for pattern in allow_patterns:
            for file in self.repository.glob(pattern):
                shutil.copy(file, self.local)
        return str(self.local)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "local").mkdir()
    (tmp_path / "remote").mkdir()
    hub = Hub(tmp_path / "remote", tmp_path / "local")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


OTHERS = {
    "README.md",
    "config.json",
    "flax_model.msgpack",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_args.bin",
}
WANTED = {"config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        ({"model.safetensors", "pytorch_model.bin"}, {"model.safetensors"}),
        ({"pytorch_model.bin"}, {"pytorch_model.bin"}),
        (
            {"model.safetensors.index.json", "model-1-of-2.safetensors", "pytorch_model.bin"},
            {"model.safetensors.index.json", "model-1-of-2.safetensors"},
        ),
        (
            {"pytorch_model.bin.index.json", "pytorch_model-1-of-2.bin"},
            {"pytorch_model.bin.index.json", "pytorch_model-1-of-2.bin"},
        ),
        (
            {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"},
            {"adapter_config.json", "adapter_model.safetensors"},
        ),
    ],
)
def test_only_what_is_needed_is_fetched(hub, files, fetched):
    for name in files | OTHERS:
        (hub.repository / name).write_bytes(b"")
    assert locate("some/mamba", "v2") == hub.local
    assert names(hub.local) == fetched | WANTED
    assert set(hub.asked) == {("some/mamba", "v2")}


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "/a/b", "../b", "a b/c", "./b"])
def test_what_is_no_id_is_a_folder(hub, name):
    assert locate(name) == Path(name)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_model(name)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["nothing", "some/mamba"])
def test_a_revision_of_a_folder(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "mamba").mkdir(parents=True)
    with pytest.raises(ArgumentError, match=f"revision: got 'v2', but {name} is no id of the hub"):
        load_model(name, revision="v2")


def test_folders_come_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(MambaLanguageModel(MambaConfig(d_model=8, n_layer=1, vocab_size=8)), "some/mamba")
    assert load_model("some/mamba").config.d_model == 8
    assert hub.asked == []
