from __future__ import annotations

import os
from pathlib import Path

import pytest

from mambakit.data import cache
from mambakit.data.cache import prepared
from mambakit.data.manifest import Manifest
from mambakit.data.preparation import prepare
from mambakit.errors import DataError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("some text", encoding="utf-8")
    return path


def test_a_corpus_is_prepared_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(source, tmp_path / "cache")
    assert folder.parent == tmp_path / "cache"
    assert Manifest.load(folder).sources == [str(source)]
    monkeypatch.setattr(cache, "prepare", None)
    assert prepared(str(source), tmp_path / "cache") == folder


def test_a_damaged_folder_is_made_again(source: Path, tmp_path: Path) -> None:
    folder = prepared(source, tmp_path / "cache")
    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(whole[:3])
    assert prepared(source, tmp_path / "cache") == folder
    assert (folder / "train.bin").read_bytes() == whole


def test_a_change_of_text_tokenizer_or_option_prepares_anew(
    source: Path, tmp_path: Path, bpe_file: Path
) -> None:
    folders = [prepared(source, tmp_path / "cache")]
    os.utime(source, (0, 0))
    folders.append(prepared(source, tmp_path / "cache"))
    folders.append(prepared(source, tmp_path / "cache", valid_fraction=0.2))
    folders.append(prepared(source, tmp_path / "cache", errors="replace"))
    folders.append(prepared(source, tmp_path / "cache", str(bpe_file)))
    folders.append(prepared([source, source], tmp_path / "cache"))
    assert len(set(folders)) == 6


def test_a_prepared_folder_is_returned_if_the_tokenizer_fits(
    source: Path, tmp_path: Path, bpe_file: Path
) -> None:
    prepare(source, tmp_path / "out")
    assert prepared(tmp_path / "out", tmp_path / "cache") == tmp_path / "out"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        prepared(tmp_path / "out", tmp_path / "cache", str(bpe_file))
