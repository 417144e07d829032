"""Which files and datasets a corpus consists of, in a fixed order."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from mambakit.data.manifest import is_prepared
from mambakit.errors import DataError

Sources: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"
Kind = Literal["text", "jsonl", "parquet", "dataset"]

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_HUB_ID = re.compile(r"[\w-]+/[\w.-]+(:[\w.-]+)?")
_DATASET_FILES = ("dataset_dict.json", "state.json")  # What `Dataset.save_to_disk` leaves.


@dataclass(frozen=True)
class Source:
    """One file, or one Hugging Face dataset (`path` is its folder or its hub id)."""

    path: Path
    kind: Kind
    named: bool
    """Given by name: if it is no text, that is an error; in a folder or glob it is skipped."""

    def __str__(self) -> str:
        return self.path.as_posix() if self.is_hub else str(self.path)

    @property
    def is_hub(self) -> bool:
        """Whether it is a dataset on the Hugging Face hub."""
        return self.kind == "dataset" and not self.path.exists()


def find_sources(sources: Sources) -> list[Source]:
    """Resolve files, folders, globs, saved datasets and hub ids.

    A hub id is "owner/name" or "owner/name:config". A folder stands for every file below it,
    sorted, without hidden ones and prepared token files.

    Raises:
        DataError: Something does not exist, or a folder or glob has no file.
    """
    names = source_names(sources)
    if not names:
        raise DataError("sources: got none, wanted at least one file, folder, glob or hub id")
    return [source for name in names for source in _find(name)]


def source_names(sources: Sources) -> list[str]:
    """The sources as a list of strings."""
    if isinstance(sources, (str, os.PathLike)):
        return [os.fspath(sources)]
    return [os.fspath(source) for source in sources]


def _find(name: str) -> Iterator[Source]:
    path = Path(name)
    if path.is_file():
        yield _file(path, named=True)
    elif path.is_dir() and any((path / file).is_file() for file in _DATASET_FILES):
        yield Source(path, "dataset", named=True)
    elif path.is_dir():
        yield from _some([_file(p, named=False) for p in _files_below(path)], f"folder {name}")
    elif glob.has_magic(name):
        matches = sorted(Path(match) for match in glob.glob(name, recursive=True))
        yield from _some([_file(p, named=False) for p in matches if p.is_file()], f"pattern {name}")
    elif _looks_like_hub_id(name):
        yield Source(path, "dataset", named=True)
    else:
        raise DataError(f"{name}: no such file or folder")


def _file(path: Path, *, named: bool) -> Source:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    return Source(path, _KINDS.get(suffixes[-1] if suffixes else "", "text"), named)


def _some(found: list[Source], what: str) -> list[Source]:
    if not found:
        raise DataError(f"{what}: holds no file to read")
    return found


def _files_below(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder, onerror=_unreadable):
        if is_prepared(parent):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _looks_like_hub_id(name: str) -> bool:
    """An "owner/name" that is not rather a mistyped path: no folder `owner`, no file suffix."""
    path = Path(name)
    suffixes = (*COMPRESSED, *_KINDS, ".txt", ".text", ".md", ".json", ".csv", ".py")
    return (
        _HUB_ID.fullmatch(name) is not None
        and not path.parent.is_dir()
        and path.suffix.lower() not in suffixes
    )
