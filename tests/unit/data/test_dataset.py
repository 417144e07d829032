from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mambakit.data.dataset import TokenDataset
from mambakit.data.preparation import prepare
from mambakit.data.tokenizer import BytesTokenizer, load_tokenizer
from mambakit.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("0123456789" * 10, encoding="utf-8")
    prepare(tmp_path / "a.txt", tmp_path / "out", valid_fraction=0.1)
    return tmp_path / "out"


def _edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def test_both_splits_open(folder: Path) -> None:
    train, valid = TokenDataset(folder), TokenDataset(folder, "valid", BytesTokenizer())
    assert (len(train), len(valid)) == (91, 10)
    assert bytes(valid.tokens[:-1].tolist()) == b"123456789"
    assert train.content != valid.content


def test_another_tokenizer_is_refused(folder: Path, bpe_file: Path) -> None:
    with pytest.raises(DataError, match=r"prepared with another tokenizer \(vocabulary 257"):
        TokenDataset(folder, tokenizer=load_tokenizer(bpe_file))


def test_a_changed_tokenizer_file_is_noticed(folder: Path, bpe_file: Path) -> None:
    load_tokenizer(bpe_file).save(folder)
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        TokenDataset(folder).tokenizer()


@pytest.mark.parametrize("name", ["train.bin", "train.documents.bin"])
def test_truncated_and_missing_files_are_noticed(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    message = f"{name}: has {len(data) - 1} bytes, the manifest says {len(data)} bytes"
    with pytest.raises(DataError, match=message):
        TokenDataset(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: is missing"):
        TokenDataset(folder)


def test_a_newer_format_asks_for_an_upgrade(folder: Path) -> None:
    _edit_manifest(folder, version=2, something="new")
    with pytest.raises(DataError, match="format version 2, this mambakit reads 1; upgrade"):
        TokenDataset(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"name": "web app"}', "not a manifest of prepared tokens"),
        ('{"format": "mambakit tokens", "version": 1}', "is damaged"),
        ('{"format": "mambakit tokens", "version": 1, "splits": {}}', "is damaged"),
    ],
)
def test_a_damaged_manifest_is_named(folder: Path, content: str, message: str) -> None:
    (folder / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"manifest\.json: {message}.*prepare the text again"):
        TokenDataset(folder)


def test_other_folders_and_missing_splits(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder of prepared tokens"):
        TokenDataset(tmp_path)
    with pytest.raises(DataError, match="has no 'test' split, only train, valid"):
        TokenDataset(folder, "test")
