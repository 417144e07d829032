"""Writing the token files of one split, and taking a validation split off the end of another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mambakit.data.manifest import SplitCounts
from mambakit.data.tokenizer import Tokenizer

_CHUNK_TOKENS = 1 << 20
_END = np.dtype("<i8")


class SplitWriter:
    """Appends tokens to `NAME.bin` and document ends to `NAME.documents.bin`.

    A context manager: leaving it closes both files, and removes them if they are empty.
    """

    def __init__(self, folder: Path, name: str, dtype: npt.DTypeLike) -> None:
        self.name = name
        self.tokens = 0
        self.documents = 0
        self.text_bytes = 0
        self._dtype = np.dtype(dtype)
        self._token_file: BinaryIO = open(folder / f"{name}.bin", "wb+")  # noqa: SIM115
        self._end_file: BinaryIO = open(folder / f"{name}.documents.bin", "wb+")  # noqa: SIM115

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in (self._token_file, self._end_file):
            file.close()
            if not self.tokens:
                Path(file.name).unlink()

    @property
    def counts(self) -> SplitCounts:
        """What was written, for the manifest."""
        return SplitCounts(tokens=self.tokens, documents=self.documents, text_bytes=self.text_bytes)

    def append(self, tokens: npt.NDArray[np.integer[Any]], text_bytes: int) -> None:
        """Append tokens that stand for so many bytes of text."""
        self._token_file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self.tokens += len(tokens)
        self.text_bytes += text_bytes

    def end_document(self) -> None:
        """Note that a document ends after what was appended so far."""
        self._append_ends(np.array([self.tokens]))

    def _append_ends(self, ends: npt.NDArray[np.int64]) -> None:
        self._end_file.write(ends.astype(_END).tobytes())
        self.documents += len(ends)

    def _token_chunks(self, start: int) -> Iterator[npt.NDArray[np.integer[Any]]]:
        self._token_file.seek(start * self._dtype.itemsize)
        while chunk := self._token_file.read(_CHUNK_TOKENS * self._dtype.itemsize):
            yield np.frombuffer(chunk, self._dtype)

    def move_to(self, other: SplitWriter, start: int, tokenizer: Tokenizer) -> None:
        """Move the tokens from `start` on to the end of `other`, cutting a document if need be.

        The text of a part is counted by decoding it, which misses what the tokenizer normalised.
        """
        shift = other.tokens - start
        text_bytes = 0 if start else self.text_bytes
        for chunk in self._token_chunks(start):
            other.append(chunk, 0)
            text_bytes += len(tokenizer.decode_bytes(chunk)) if start else 0
        other.text_bytes += text_bytes
        self.text_bytes -= text_bytes

        self._end_file.seek(0)
        ends = np.frombuffer(self._end_file.read(), _END)
        other._append_ends(ends[ends > start] + shift)
        self._token_file.truncate(start * self._dtype.itemsize)
        self._end_file.truncate(0)
        self._token_file.seek(0, os.SEEK_END)
        self._end_file.seek(0)
        self.tokens, self.documents = start, 0
        self._append_ends(ends[ends < start])
        if start:
            self.end_document()


def balance(
    train: SplitWriter, valid: SplitWriter, valid_fraction: float, tokenizer: Tokenizer
) -> None:
    """Let `valid` be the last tokens of both, if its size misses the wanted one by far."""
    total = train.tokens + valid.tokens
    if valid_fraction / 2 <= valid.tokens / total <= valid_fraction * 2:
        return
    valid.move_to(train, 0, tokenizer)
    train.move_to(valid, total - int(total * valid_fraction), tokenizer)
