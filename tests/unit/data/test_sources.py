from __future__ import annotations

from pathlib import Path

import pytest

from mambakit.data.sources import find_sources
from mambakit.errors import DataError


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x", encoding="utf-8")


def test_a_folder_is_its_files_in_order_without_hidden_ones(tmp_path: Path) -> None:
    _touch(tmp_path, "b.txt", "a/z.py", "a/.hidden", ".git/config", "c.jsonl.gz", "d.parquet")
    found = find_sources(tmp_path)
    assert [(s.path.relative_to(tmp_path).as_posix(), s.kind, s.named) for s in found] == [
        ("a/z.py", "text", False),
        ("b.txt", "text", False),
        ("c.jsonl.gz", "jsonl", False),
        ("d.parquet", "parquet", False),
    ]


def test_prepared_folders_below_are_left_out(tmp_path: Path) -> None:
    _touch(tmp_path, "a.txt", "tokens/manifest.json", "tokens/train.bin", "tokens/tokenizer.json")
    assert [s.path.name for s in find_sources(tmp_path)] == ["a.txt"]


def test_several_sources_keep_their_order_and_globs_recurse(tmp_path: Path) -> None:
    _touch(tmp_path, "z.txt", "code/b.py", "code/deep/a.py", "code/c.md")
    found = find_sources([tmp_path / "z.txt", str(tmp_path / "code" / "**" / "*.py")])
    assert [s.path.name for s in found] == ["z.txt", "b.py", "a.py"]
    assert [s.named for s in found] == [True, False, False]


def test_saved_datasets_and_hub_ids_are_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _touch(tmp_path, "saved/state.json", "saved/data.arrow")
    saved, plain, config = find_sources(["saved", "owner/name", "owner/name-2.0:part"])
    assert [s.kind for s in (saved, plain, config)] == ["dataset"] * 3
    assert [s.is_hub for s in (saved, plain, config)] == [False, True, True]
    assert str(config) == "owner/name-2.0:part"


@pytest.mark.parametrize("name", ["data.txt", "folder/data", "other/data.txt", "a/b/c", "./x/y"])
def test_a_mistyped_path_is_not_taken_for_a_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=f"{name}: no such file or folder"):
        find_sources(name)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folder .* holds no file"):
        find_sources(tmp_path)
    with pytest.raises(DataError, match=r"pattern .*\*.txt: holds no file"):
        find_sources(str(tmp_path / "*.txt"))
    with pytest.raises(DataError, match="got none"):
        find_sources([])
