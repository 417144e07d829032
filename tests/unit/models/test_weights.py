from __future__ import annotations

import json
import os
import pickle
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambakit.errors import CheckpointError
from mambakit.models import MambaConfig, MambaLanguageModel, load_model, save_model
from mambakit.models import weights as weights_module
from mambakit.models.weights import open_tensors, read_tensors, weight_files, write_pickle

FILES = {"official": "pytorch_model.bin", "huggingface": "model.safetensors"}


@pytest.fixture
def model() -> MambaLanguageModel:
    return MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=56))


@pytest.fixture(params=FILES)
def saved(request, model, tmp_path):
    save_model(model, tmp_path, request.param)
    return tmp_path


def weights_of(folder) -> dict[str, torch.Tensor]:
    (path,) = weight_files(folder)
    return open_tensors(path)


def write(weights, path):
    if path.suffix == ".bin":
        torch.save(weights, path)
    else:
        save_file(weights, path)


def split(folder) -> dict[str, dict[str, torch.Tensor]]:
    """Put the weights of a folder in three shards; gives their names and contents."""
    (whole,) = weight_files(folder)
    # Copied, since the file goes; a tied head is stored once in the official format.
    weights = {name: tensor.clone() for name, tensor in open_tensors(whole).items()}
    names = [f"{whole.stem}-{i:05d}-of-00003{whole.suffix}" for i in (1, 2, 3)]
    shards = {file: dict(list(weights.items())[i::3]) for i, file in enumerate(names)}
    for file, part in shards.items():
        write(part, folder / file)
    whole.unlink()
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{whole.name}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return shards


def test_shards(saved, model):
    shards = split(saved)
    assert [path.name for path in weight_files(saved)] == list(shards)
    loaded = load_model(saved)
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor), name


def test_a_shard_that_is_missing(saved):
    shards = split(saved)
    gone = list(shards)[1:]
    for file in gone:
        (saved / file).unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json names {', '.join(gone)}, missing"):
        load_model(saved)


def edit_index(folder, edit):
    (path,) = folder.glob("*.index.json")
    index = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(edit(index)), encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/file.safetensors", "..", "", "C:\\x.bin", 7]
)  # fmt: skip
def test_an_index_that_leads_outside_its_folder(saved, name):
    split(saved)
    (saved.parent / "outside.safetensors").write_bytes(b"secret")
    edit_index(saved, lambda index: {"weight_map": {**index["weight_map"], "x": name}})
    with pytest.raises(
        CheckpointError, match=rf"names {re.escape(repr(name))}, which is not a file"
    ):
        load_model(saved)


@pytest.mark.parametrize("content", [[], {}, {"weight_map": ["a"]}])
def test_an_index_that_is_none(saved, content):
    split(saved)
    edit_index(saved, lambda _: content)
    with pytest.raises(CheckpointError, match="is no index of weights"):
        load_model(saved)


def test_an_index_that_is_cut_off(saved):
    split(saved)
    (path,) = saved.glob("*.index.json")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="is no index of weights"):
        load_model(saved)


@pytest.mark.parametrize("size", [0, 5, 3000, -1])
def test_files_that_are_cut_off(saved, size):
    (path,) = weight_files(saved)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged or cut off"):
        load_model(saved)


class Harmful:
    """Opening its pickle makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("place", ["value", "beside", "instead"])
def test_pickles_with_code_are_refused(model, tmp_path, new, place):
    save_model(model, tmp_path, "official")
    path, trap = tmp_path / "pytorch_model.bin", tmp_path / "trap"
    weights = {**weights_of(tmp_path)}
    content = {
        "value": {**weights, "backbone.norm_f.weight": Harmful(trap)},
        "beside": {**weights, "x": Harmful(trap)},
        "instead": Harmful(trap),
    }[place]
    torch.save(content, tmp_path / "new.bin", _use_new_zipfile_serialization=new)
    os.replace(tmp_path / "new.bin", path)
    with pytest.raises(
        CheckpointError, match=r"is refused: besides tensors it holds (posix|nt)\.mkdir"
    ):
        load_model(tmp_path)
    assert not trap.exists()


def test_a_plain_pickle_with_code_is_refused(model, tmp_path):
    save_model(model, tmp_path, "official")
    trap = tmp_path / "trap"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(trap)))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is (refused|damaged)"):
        load_model(tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"state_dict": {}}, {1: torch.ones(1)}])
def test_pickles_that_are_no_table(model, tmp_path, content):
    save_model(model, tmp_path, "official")
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no table of tensors"):
        load_model(tmp_path)


def test_pickles_of_old_times(model, tmp_path):
    save_model(model, tmp_path, "official")
    path = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    loaded = load_model(tmp_path)
    assert loaded.backbone.embedding.weight.equal(model.backbone.embedding.weight)


def test_no_weights(saved):
    (path,) = weight_files(saved)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing, and so is pytorch_"):
        load_model(saved)


def test_another_format_takes_the_place_of_the_first(saved, model):
    other = MambaLanguageModel(MambaConfig(d_model=8, n_layer=1, vocab_size=56))
    for format, file in FILES.items():
        save_model(other, saved, format)
        assert [path.name for path in weight_files(saved)] == [file]
        assert load_model(saved).lm_head.weight.equal(other.lm_head.weight)


def opened(monkeypatch) -> list:
    """Files that are opened from now on."""
    files = []
    monkeypatch.setattr(
        weights_module, "open_tensors", lambda path: files.append(path) or open_tensors(path)
    )
    return files


@pytest.mark.parametrize("limit", [1, 5000, 2**40])
def test_a_file_that_is_converted_is_mapped_anew_now_and_then(saved, monkeypatch, limit):
    monkeypatch.setattr(weights_module, "MAPPED_BYTES", limit)
    files = opened(monkeypatch)
    (path,) = weight_files(saved)
    # One stays as it is. Copied all the same, it does not hold the file.
    found = read_tensors(
        path, torch.device("cpu"), lambda name, t: t.dtype if "norm_f" in name else torch.float64
    )
    expected = weights_of(saved)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor.to(found[name].dtype)) for name, tensor in expected.items())
    assert {name for name, t in found.items() if t.dtype == torch.float32} == {
        "backbone.norm_f.weight"
    }
    sizes = {tensor.untyped_storage().nbytes() for tensor in found.values()}
    assert max(sizes) == 2 * max(tensor.nbytes for tensor in expected.values())
    total = sum(t.nbytes for t in expected.values())
    if limit == 5000:
        assert 2 <= len(files) <= total / 5000 + 1
    else:
        assert len(files) == {1: len(expected), 2**40: 1}[limit]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_a_file_that_needs_no_conversion_stays_mapped(saved, monkeypatch):
    monkeypatch.setattr(weights_module, "MAPPED_BYTES", 1)
    files = opened(monkeypatch)
    (path,) = weight_files(saved)
    found = read_tensors(path, torch.device("cpu"), lambda name, t: t.dtype)
    assert len(files) == 1
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    (ranges,) = [line.split()[0] for line in maps if line.endswith(str(path))]
    first, last = (int(address, 16) for address in ranges.split("-"))
    assert all(first <= tensor.data_ptr() < last for tensor in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tensor_can_be_left_out(saved, dtype):
    (path,) = weight_files(saved)
    found = read_tensors(
        path, torch.device("cpu"), lambda name, t: None if "norm" in name else dtype
    )
    assert found.keys() == {name for name in weights_of(saved) if "norm" not in name}
    assert {tensor.dtype for tensor in found.values()} == {dtype}


def test_safetensors_come_before_pickles(saved, model):
    if not (saved / "model.safetensors").exists():
        save_file({"x": torch.ones(1)}, saved / "model.safetensors")
    else:
        torch.save({"x": torch.ones(1)}, saved / "pytorch_model.bin")
    assert [path.name for path in weight_files(saved)] == ["model.safetensors"]
    assert load_file(saved / "model.safetensors").keys() == weights_of(saved).keys()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among its files")
def test_ctrl_c_while_a_pickle_is_written_stays_ctrl_c(tmp_path) -> None:
    # A pipe that nobody reads from holds the writer where the signal shall find it.
    pipe = tmp_path / "pickle"
    os.mkfifo(pipe)

    def interrupt_and_drain() -> None:
        with open(pipe, "rb") as file:
            time.sleep(0.2)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            file.read()

    # Where tests run in the background of a shell, Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt_and_drain)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            write_pickle(torch.ones(1 << 20), pipe)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_full_disk_under_a_pickle_says_so() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        write_pickle(torch.ones(1 << 20), Path("/dev/full"))
