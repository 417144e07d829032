"""Text corpus to token files: tokenised in parallel, in bounded memory, all or nothing."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import mambakit
from mambakit.data.manifest import FILES, VERSION, Manifest, is_prepared
from mambakit.data.sources import Sources
from mambakit.data.text import PIECE_BYTES, Errors, Piece, TextReader
from mambakit.data.tokenfiles import SplitWriter, balance
from mambakit.data.tokenizer import Tokenizer, load_tokenizer, token_dtype
from mambakit.errors import ArgumentError, DataError
from mambakit.files import atomic_folder


@dataclass(frozen=True)
class Progress:
    """How far `prepare` has come."""

    documents: int
    tokens: int
    position: int
    """Bytes on disk read so far."""
    size: int | None
    """Bytes on disk in all, None if unknown."""


def prepare(
    sources: Sources,
    out: str | os.PathLike[str],
    tokenizer: Tokenizer | str | os.PathLike[str] = "bytes",
    *,
    valid_fraction: float = 0.05,
    errors: Errors = "strict",
    text_key: str = "text",
    split: str = "train",
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Tokenise a corpus into a folder of memory-mapped token files.

    Documents go to the validation split by a hash of their text, so that a document stays where it
    is when the corpus grows, and copies of it stay together. Where that gives less than half or
    more than twice the wanted size, as with one document or a few, validation gets the last tokens
    instead. The result does not depend on `workers`.

    A long text file is tokenised in pieces of about a megabyte that end at a line's end. To the
    byte tokenizer this makes no difference; a BPE tokenizer may spell the line ends at such a
    border otherwise, one token in some hundred thousand.

    Args:
        sources: Text files, folders, globs, .jsonl, parquet, datasets: see `TextReader`.
        out: Folder to write; must be new, empty or an earlier result, which is replaced.
        tokenizer: A tokenizer, or what `load_tokenizer` takes.
        valid_fraction: Part for validation, from 0 (no validation split) to below 1.
        errors: "strict" or "replace", for text that is not UTF-8.
        text_key: Key or column of the text in .jsonl, parquet and datasets.
        split: Split of a Hugging Face dataset.
        workers: Threads that tokenise (both tokenizers let go of Python's lock while they work).
            Default: one per core.
        progress: Called every quarter of a megabyte or so.

    Returns:
        The manifest of the folder.

    Raises:
        DataError: The corpus is empty or cannot be read, or `out` holds something else.
        MambakitError: `out` cannot be written.
    """
    if not 0 <= valid_fraction < 1:
        raise ArgumentError(f"valid_fraction: got {valid_fraction}, wanted 0 to below 1")
    if workers is not None and workers < 1:
        raise ArgumentError(f"workers: got {workers}, wanted at least 1")
    _check_replaceable(Path(out))
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer)
    reader = TextReader(sources, errors=errors, text_key=text_key, split=split)
    with atomic_folder(out) as folder:
        dtype = token_dtype(tokenizer.vocab_size)
        with (
            SplitWriter(folder, "train", dtype) as train,
            SplitWriter(folder, "valid", dtype) as valid,
        ):
            splitter = _Splitter(train, valid, valid_fraction)
            for pieces in _tokenised(reader, tokenizer, workers or os.cpu_count() or 1):
                for piece in pieces:
                    splitter.add(piece)
                if progress is not None:
                    progress(_progress(train, valid, reader))
            balance(train, valid, valid_fraction, tokenizer)
        manifest = Manifest(
            mambakit=mambakit.__version__,
            sources=reader.names,
            errors=errors,
            valid_fraction=valid_fraction,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            dtype=dtype,
            content=splitter.content(tokenizer),
            splits={writer.name: writer.counts for writer in (train, valid) if writer.tokens},
        )
        tokenizer.save(folder)
        manifest.save(folder)
    return manifest


def _progress(train: SplitWriter, valid: SplitWriter, reader: TextReader) -> Progress:
    return Progress(
        documents=train.documents + valid.documents,
        tokens=train.tokens + valid.tokens,
        position=reader.position,
        size=reader.size,
    )


def _check_replaceable(out: Path) -> None:
    if not out.exists():
        return
    names = {file.name for file in out.iterdir()} if out.is_dir() else {out.name}
    if other := sorted(names - FILES if is_prepared(out) else names):
        raise DataError(
            f"{out}: holds something else ({other[0]}), which would be lost; choose a new or empty folder"
        )


class _Tokenised(NamedTuple):
    """A piece of text as tokens, with its separator if it ends a document."""

    tokens: npt.NDArray[np.int32]
    ends_document: bool
    text_bytes: int
    digest: bytes


def _tokenised(
    reader: TextReader, tokenizer: Tokenizer, workers: int
) -> Iterator[list[_Tokenised]]:
    """Tokenise pieces in order; at most three tasks per worker are in memory at a time."""

    def encode(piece: Piece) -> _Tokenised:
        utf8 = piece.text.encode("utf-8")
        tokens = tokenizer.encode(piece.text)
        if piece.ends_document:
            tokens = np.append(tokens, np.int32(tokenizer.eos_id))
        digest = hashlib.blake2b(utf8, digest_size=16).digest()
        return _Tokenised(tokens, piece.ends_document, len(utf8), digest)

    def encode_all(task: list[Piece]) -> list[_Tokenised]:
        return [encode(piece) for piece in task]

    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[list[_Tokenised]]] = deque()
    try:
        for task in _tasks(reader):
            pending.append(pool.submit(encode_all, task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks(reader: TextReader) -> Iterator[list[Piece]]:
    """Group pieces so that a task is worth handing to a thread."""
    task: list[Piece] = []
    size = 0
    for piece in reader:
        task.append(piece)
        size += len(piece.text)
        if size >= PIECE_BYTES // 4:
            yield task
            task, size = [], 0
    if task:
        yield task


class _Splitter:
    """Sends every document to its split and hashes what went where."""

    def __init__(self, train: SplitWriter, valid: SplitWriter, valid_fraction: float) -> None:
        self._train, self._valid, self._valid_fraction = train, valid, valid_fraction
        self._hash = hashlib.blake2b(digest_size=16)
        self._writer: SplitWriter | None = None

    def add(self, piece: _Tokenised) -> None:
        """Append a piece to its document's split, which the hash of the first piece decides."""
        self._hash.update(piece.digest + bytes([piece.ends_document]))
        if self._writer is None:
            share = int.from_bytes(piece.digest[:8], "little") / 2**64
            self._writer = self._valid if share < self._valid_fraction else self._train
        self._writer.append(piece.tokens, piece.text_bytes)
        if piece.ends_document:
            self._writer.end_document()
            self._writer = None

    def content(self, tokenizer: Tokenizer) -> str:
        """Identity of the token files: the text, the tokenizer, the way of splitting."""
        rest = (VERSION, tokenizer.fingerprint, self._valid_fraction)
        return hashlib.sha256(self._hash.digest() + repr(rest).encode()).hexdigest()
