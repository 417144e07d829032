"""One split of a prepared folder, memory-mapped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mambakit.data.manifest import Manifest
from mambakit.data.tokenizer import Tokenizer, load_tokenizer
from mambakit.errors import DataError


class TokenDataset:
    """Tokens and document ends of one split; nothing is read before it is used.

    Args:
        folder: What `prepare` wrote.
        split: "train" or "valid".
        tokenizer: Tokenizer that the model will see; checked against the one of the folder.

    Attributes:
        tokens: (tokens,) uint16 or uint32, memory-mapped.
        document_ends: (documents,) int64, memory-mapped: one past each document's separator.
        text_bytes: UTF-8 bytes of the split's text, for bits per byte.

    Raises:
        DataError: Not a prepared folder, or from another version, or of another tokenizer; the
            split is missing; a file is missing or has another size than the manifest says.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str = "train",
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.split = split
        self.manifest = Manifest.load(folder)
        if tokenizer is not None:
            self.manifest.check_tokenizer(tokenizer, folder)
        if split not in self.manifest.splits:
            names = ", ".join(self.manifest.splits)
            raise DataError(
                f"{folder}: has no {split!r} split, only {names}; take one of these, or prepare it again"
            )
        counts = self.manifest.splits[split]
        self.text_bytes = counts.text_bytes
        self.tokens: npt.NDArray[np.unsignedinteger[Any]] = _mapped(
            self.folder / f"{split}.bin", self.manifest.dtype, counts.tokens
        )
        self.document_ends: npt.NDArray[np.int64] = _mapped(
            self.folder / f"{split}.documents.bin", "<i8", counts.documents
        )

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def content(self) -> str:
        """Identity of these tokens, wherever the folder lies."""
        return f"{self.manifest.content}/{self.split}"

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens, from the copy in the folder."""
        tokenizer = load_tokenizer(self.folder)
        self.manifest.check_tokenizer(tokenizer, self.folder)
        return tokenizer


def _mapped(path: Path, dtype: str, length: int) -> npt.NDArray[Any]:
    expected = length * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        got = "is missing" if size is None else f"has {size:,} bytes"
        raise DataError(f"{path}: {got}, the manifest says {expected:,} bytes; prepare it again")
    return np.asarray(np.memmap(path, dtype, "r"))  # Slicing a plain view is faster.
