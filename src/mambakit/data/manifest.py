"""What is in a folder of token files.

    manifest.json                     this, written last
    train.bin, valid.bin              token ids, each document followed by the separator
    {train,valid}.documents.bin       int64, where each document ends: one past its separator
    tokenizer.json                    the tokenizer itself; of Hugging Face's also tokenizer_config.json

Numbers are little-endian. A split that is empty has no files. A document that is cut in two for the
sake of the validation split counts in both, and its first part has no separator.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambakit.data.tokenizer import Tokenizer
from mambakit.errors import DataError
from mambakit.files import atomic_write

FORMAT = "mambakit tokens"
VERSION = 1
FILES = {
    "manifest.json", "tokenizer.json", "tokenizer_config.json",
    "train.bin", "train.documents.bin", "valid.bin", "valid.documents.bin",
}  # fmt: skip
"""All that a prepared folder may hold."""


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Sizes of one split."""

    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the text, for bits per byte."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a prepared folder."""

    format: str = FORMAT
    version: int = VERSION
    mambakit: str
    """Version of mambakit that wrote it."""
    sources: list[str]
    errors: str
    valid_fraction: float
    fingerprint: str
    """Of the tokenizer."""
    vocab_size: int
    eos_id: int
    dtype: str
    """NumPy dtype of the token files."""
    content: str
    """Hash of the text and everything else that decides the token files."""
    splits: dict[str, SplitCounts]

    def save(self, folder: Path) -> None:
        """Write `manifest.json`."""
        with atomic_write(folder / "manifest.json") as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read `manifest.json`.

        Raises:
            DataError: The folder was not prepared, or by a newer mambakit, or its manifest is
                damaged.
        """
        path = Path(folder) / "manifest.json"
        again = "; prepare the text again (mambakit prepare)"
        if not path.is_file():
            what = "has no manifest.json" if Path(folder).exists() else "is not there"
            raise DataError(
                f"{folder}: not a folder of prepared tokens, it {what}; make one with mambakit prepare"
            )
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            known, version = content.get("format"), content.get("version")
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: cannot be read ({error}){again}") from error
        if known != FORMAT:
            raise DataError(f"{path}: not a manifest of prepared tokens{again}")
        if version != VERSION:
            raise DataError(
                f"{path}: has format version {version}, this mambakit reads {VERSION}; "
                "upgrade mambakit, or prepare the text again"
            )
        try:
            splits = {name: SplitCounts(**counts) for name, counts in content["splits"].items()}
            return cls(**{**content, "splits": splits})
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: is damaged ({error}){again}") from error

    def check_tokenizer(self, tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
        """Raise DataError unless `tokenizer` is the one that made the token files."""
        if tokenizer.fingerprint != self.fingerprint:
            raise DataError(
                f"{folder}: was prepared with another tokenizer (vocabulary {self.vocab_size}, "
                f"this one {tokenizer.vocab_size}); use the one in that folder, or prepare again"
            )


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds token files, of whatever version."""
    return all(Path(folder, name).is_file() for name in ("manifest.json", "train.bin"))
