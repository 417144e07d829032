"""The cache of compiled kernels: whole files only, and never in the way."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from mambakit.ops.cuda import binaries


class Compiler:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return b"\x7fELF and more"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAMBAKIT_CACHE", str(tmp_path))
    return tmp_path / "cuda"


def test_kept(folder: Path) -> None:
    make = Compiler()
    assert binaries.cached("key", make) == binaries.cached("key", make) == b"\x7fELF and more"
    assert make.calls == 1
    assert [path.name for path in folder.iterdir()] == ["key.bin"]
    binaries.cached("other", make)
    assert make.calls == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "digest only"])
def test_a_damaged_file_is_made_anew(folder: Path, damage: str) -> None:
    make = Compiler()
    binaries.cached("key", make)
    path = folder / "key.bin"
    whole = path.read_bytes()
    changed = {
        "empty": b"",
        "cut": whole[:-1],
        "changed": whole[:-1] + b"?",
        "digest only": whole[:32],
    }
    path.write_bytes(changed[damage])
    assert binaries.cached("key", make) == b"\x7fELF and more"
    assert make.calls == 2
    assert path.read_bytes() == whole


def test_nothing_is_left_of_a_failure(folder: Path) -> None:
    def fail() -> bytes:
        raise ValueError("does not compile")

    with pytest.raises(ValueError, match="does not compile"):
        binaries.cached("key", fail)
    assert not folder.exists() or not list(folder.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled all the same; one warning says where and what to do."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MAMBAKIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(binaries, "_warned", False)
    make = Compiler()
    with pytest.warns(UserWarning, match=re.escape(str(tmp_path / "file"))) as caught:
        assert binaries.cached("key", make) == b"\x7fELF and more"
    assert "set MAMBAKIT_CACHE" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert binaries.cached("key", make) == b"\x7fELF and more"
        assert binaries.cached("second", make) == b"\x7fELF and more"
    assert make.calls == 3


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MAMBAKIT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(binaries, "_warned", False)
    with pytest.warns(UserWarning, match="home directory"):
        assert binaries.cached("key", Compiler()) == b"\x7fELF and more"


def test_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBAKIT_CACHE", "own")
    assert binaries.folder() == Path("own/cuda")
    monkeypatch.delenv("MAMBAKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert binaries.folder() == Path("xdg/mambakit/cuda")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert binaries.folder() == Path.home() / ".cache" / "mambakit" / "cuda"
