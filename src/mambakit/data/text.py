"""Text out of a corpus, document by document, in bounded memory.

A document is a text file, a line of a .jsonl file, or a row of a parquet file or Hugging Face
dataset. Long text files come in pieces, so that a corpus of one huge file works too.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import logging
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from mambakit.data.sources import Source, Sources, find_sources, source_names
from mambakit.errors import ArgumentError, DataError

PIECE_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 1000
_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)
_logger = logging.getLogger(__name__)

Errors = Literal["strict", "replace"]


class Piece(NamedTuple):
    """A document, or a part of a long one that ends with a line (or if there is none, anywhere)."""

    text: str
    ends_document: bool


class TextReader:
    """The text of a corpus as an iterable of pieces.

    Args:
        sources: Files, folders, globs, saved datasets, hub ids; one or several. Text files (UTF-8,
            line ends kept as they are) and .jsonl may be compressed (.gz, .zst, .xz, .bz2).
        errors: "strict": a named file that is binary or not UTF-8 is an error. "replace": what is
            not UTF-8 becomes U+FFFD. Binary files of a folder or glob are skipped either way.
        text_key: Key or column that holds the text in .jsonl, parquet and datasets.
        split: Split of a Hugging Face dataset.

    Attributes:
        size: Bytes on disk of all files, None if a dataset has no known size.
        position: Bytes on disk read so far.

    Raises:
        DataError: On construction if a source does not exist, while iterating if one is empty,
            damaged or no text. The message names the file and the line or byte.
    """

    def __init__(
        self,
        sources: Sources,
        *,
        errors: Errors = "strict",
        text_key: str = "text",
        split: str = "train",
    ) -> None:
        if errors not in ("strict", "replace"):
            raise ArgumentError(f"errors: got {errors!r}, wanted 'strict' or 'replace'")
        self.names = source_names(sources)
        self.sources = find_sources(sources)
        self.errors = errors
        self.text_key = text_key
        self.split = split
        files = [source.path for source in self.sources if source.kind != "dataset"]
        whole = len(files) == len(self.sources)
        self.size = sum(file.stat().st_size for file in files) if whole else None
        self.position = 0
        self._skipped: list[Path] = []

    def __iter__(self) -> Iterator[Piece]:
        self.position = 0
        self._skipped.clear()
        empty = True
        for source in self.sources:
            start, some = self.position, False
            for piece in self._pieces(source):
                some = True
                yield piece
            if source.named and not some:
                raise DataError(f"{source}: is empty")
            empty = empty and not some
            if source.kind != "dataset":
                self.position = start + source.path.stat().st_size
        if self._skipped:
            _logger.warning("skipped %d binary file(s): %s", *_names(self._skipped))
        if empty:
            raise DataError(f"{', '.join(self.names[:3])}: no text in any file")

    def _pieces(self, source: Source) -> Iterator[Piece]:
        if source.kind == "parquet":
            yield from self._parquet(source.path)
        elif source.kind == "dataset":
            yield from self._dataset(source)
        else:
            read = self._jsonl if source.kind == "jsonl" else self._text
            start = self.position
            with _opened(source.path) as (file, stream):
                for piece in read(source, stream):
                    self.position = start + file.tell()
                    yield piece

    def _text(self, source: Source, stream: BinaryIO) -> Iterator[Piece]:
        data = stream.read(PIECE_BYTES)
        if b"\0" in data[:8192]:
            if not source.named:
                self._skipped.append(source.path)
                return
            if self.errors == "strict":
                raise DataError(f"{source}: {_no_text(data)}")
        offset = len(_BOM) if data.startswith(_BOM) else 0
        data = data[offset:]
        while following := stream.read(PIECE_BYTES):
            cut = _cut(data)
            yield Piece(self._decoded(data[:cut], source, offset), False)
            offset += cut
            data = data[cut:] + following
        if data:
            yield Piece(self._decoded(data, source, offset), True)

    def _decoded(self, data: bytes, source: Source, offset: int) -> str:
        try:
            return data.decode("utf-8", self.errors)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source}: not UTF-8 text, byte {offset + error.start} is 0x"
                f"{data[error.start]:02x}; convert it, or read it with --errors replace"
            ) from error

    def _jsonl(self, source: Source, stream: BinaryIO) -> Iterator[Piece]:
        offset = 0
        for number, line in enumerate(stream, start=1):
            text = self._decoded(line.removeprefix(_BOM), source, offset)
            offset += len(line)
            if text.strip():
                where = f"{source} line {number}"
                yield from self._row(_json_value(text, self.text_key, where), where)

    def _parquet(self, path: Path) -> Iterator[Piece]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                _check_column(self.text_key, file.schema_arrow.names, str(path))
                for batch in file.iter_batches(_BATCH_ROWS, columns=[self.text_key]):
                    for text in batch.column(0).to_pylist():
                        yield from self._row(text, str(path))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file ({error})") from error

    def _dataset(self, source: Source) -> Iterator[Piece]:
        dataset = _load_dataset(source, self.split)
        _check_column(self.text_key, dataset.column_names, str(source))
        for batch in dataset.select_columns([self.text_key]).iter(_BATCH_ROWS):
            for text in batch[self.text_key]:
                yield from self._row(text, str(source))

    def _row(self, text: object, where: str) -> Iterator[Piece]:
        """A document that is in memory already; an empty one counts as none."""
        if not isinstance(text, str):
            kind = type(text).__name__
            raise DataError(f"{where}: {self.text_key!r} is {kind}, wanted a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half of a character.
            if self.errors == "strict":
                raise DataError(
                    f"{where}: character {error.start} is a lone surrogate, which no UTF-8 text "
                    "may hold; mend it, or read it with --errors replace"
                ) from error
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text:
            yield Piece(text, True)


def documents(
    sources: Sources, *, errors: Errors = "strict", text_key: str = "text", split: str = "train"
) -> Iterator[str]:
    """Iterate over the documents of a corpus; arguments and errors as for `TextReader`.

    A document is held in memory whole; `TextReader` gives long ones in pieces.
    """
    parts = []
    for piece in TextReader(sources, errors=errors, text_key=text_key, split=split):
        parts.append(piece.text)
        if piece.ends_document:
            yield "".join(parts)
            parts.clear()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Give the file and the stream of its decompressed bytes; reading errors become DataError."""
    try:
        with open(path, "rb") as file:
            yield file, _decompressed(file, path.suffix.lower())
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from error


def _decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(file))
    if suffix == ".bz2":
        return cast(BinaryIO, bz2.BZ2File(file))
    if suffix == ".zst":
        import pyarrow

        # Unlike the reader of `zstandard`, this one notices a truncated file.
        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    return file


def _cut(data: bytes) -> int:
    """Where to end a piece: after the last line, else before the last character."""
    after_line = data.rfind(b"\n") + 1
    if after_line:
        return after_line
    for back in range(1, 5):
        if data[-back] & 0xC0 != 0x80:  # Not a continuation byte: a character starts here.
            return len(data) - back
    return len(data)


def _no_text(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16; convert it to UTF-8"
    at = data.index(b"\0")
    return (
        f"is binary (byte {at} is zero); give text, or read it all the same with --errors replace"
    )


def _json_value(line: str, key: str, where: str) -> object:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: got {type(row).__name__}, wanted an object with {key!r}")
    _check_column(key, list(row), where)
    return row[key]


def _check_column(key: str, names: list[str], where: str) -> None:
    if key not in names:
        listed = ", ".join(map(repr, names[:10])) or "none"
        raise DataError(f"{where}: has no {key!r}, only {listed}; choose one with --text-key")


def _load_dataset(source: Source, split: str) -> Any:
    import datasets

    try:
        if not source.is_hub:
            loaded = datasets.load_from_disk(str(source.path))
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        name, _, config = str(source).partition(":")
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # Offline, unknown, gated, no such config or split: many types.
        reason = str(error).strip().partition("\n")[0]
        what = "no such file, nor a dataset that the hub gives" if source.is_hub else "not loadable"
        raise DataError(f"{source}: {what} ({type(error).__name__}: {reason})") from error


def _names(paths: list[Path]) -> tuple[int, str]:
    more = ", ..." if len(paths) > 3 else ""
    return len(paths), ", ".join(str(path) for path in paths[:3]) + more
