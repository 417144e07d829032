from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mambakit.data import text as text_module
from mambakit.data.text import TextReader, documents
from mambakit.errors import ArgumentError, DataError

Compress = Callable[[bytes], bytes]
COMPRESS: dict[str, Compress] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_and_jsonl_compressed_or_not(suffix: str, tmp_path: Path) -> None:
    compress = COMPRESS[suffix]
    plain = _write(tmp_path / f"a.txt{suffix}", compress("grün\r\nß".encode()))
    lines = b'{"text": "one"}\n\n{"text": "zw\\u00f6lf", "id": 3}\n{"text": ""}'
    rows = _write(tmp_path / f"a.jsonl{suffix}", compress(lines))
    assert list(documents([plain, rows])) == ["grün\r\nß", "one", "zwölf"]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_a_truncated_file_is_an_error(suffix: str, tmp_path: Path) -> None:
    data = COMPRESS[suffix](bytes(range(32, 127)) * 1000)
    path = _write(tmp_path / f"a.txt{suffix}", data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.txt\S*: cannot be read"):
        list(documents(path))


def test_all_frames_of_a_zst_file_are_read(tmp_path: Path) -> None:
    data = COMPRESS[".zst"](b"one ") + COMPRESS[".zst"](b"two")
    assert list(documents(_write(tmp_path / "a.zst", data))) == ["one two"]


def test_parquet_and_saved_datasets(tmp_path: Path) -> None:
    table = pyarrow.table({"content": ["one", "", "zwölf"], "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(documents(tmp_path / "a.parquet", text_key="content")) == ["one", "zwölf"]
    data = datasets.Dataset(table)
    data.save_to_disk(tmp_path / "plain", num_proc=None)
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
    assert list(documents(tmp_path / "plain", text_key="content")) == ["one", "zwölf"]
    found = list(documents(tmp_path / "splits", text_key="content", split="test"))
    assert found == ["one", "zwölf"]
    with pytest.raises(DataError, match="splits: not loadable"):
        list(documents(tmp_path / "splits", text_key="content"))
    with pytest.raises(DataError, match="plain: has no 'text', only 'content', 'id'"):
        list(documents(tmp_path / "plain"))


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [f"{name} {config} {split}"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = list(documents(["owner/name", "owner/name:part"], split="test"))
    assert found == ["owner/name None test", "owner/name part test"]


def test_an_unreachable_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **options: object) -> None:
        raise ConnectionError("no route\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"owner/name: no such file.*ConnectionError: no route\)$"):
        list(documents("owner/name"))


def test_a_long_file_comes_in_pieces_that_end_with_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "PIECE_BYTES", 8)
    content = "eins\nzwei\nääääääääääääää\ndrei"
    reader = TextReader(_write(tmp_path / "a.txt", content.encode()))
    pieces = list(reader)
    assert "".join(piece.text for piece in pieces) == content
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[0].text == "eins\n"
    assert max(len(piece.text.encode()) for piece in pieces) <= 16
    assert list(documents(tmp_path / "a.txt")) == [content]


def test_position_reaches_size(tmp_path: Path) -> None:
    _write(tmp_path / "a.txt", b"x" * 100)
    _write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 50))
    reader = TextReader(tmp_path)
    positions = [reader.position for _ in reader]
    assert positions == sorted(positions)
    assert positions[0] == 100
    assert reader.position == reader.size == sum(f.stat().st_size for f in tmp_path.iterdir())


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert list(documents(_write(tmp_path / "a.txt", b"\xef\xbb\xbfhello"))) == ["hello"]
    assert list(documents(_write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}'))) == ["a"]


def test_wrong_encoding_names_the_byte_and_replace_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "PIECE_BYTES", 8)
    path = _write(tmp_path / "a.txt", "\ufefferste Zeile\n".encode() + "grün".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 text, byte 17 is 0xfc; .*--errors replace"):
        list(documents(path))
    assert list(documents(path, errors="replace")) == ["erste Zeile\ngr\N{REPLACEMENT CHARACTER}n"]


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def test_a_named_binary_file_is_an_error_unless_replaced(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.png", PNG)
    with pytest.raises(DataError, match=r"a\.png: is binary \(byte 8 is zero\)"):
        list(documents(path))
    assert list(documents(path, errors="replace")) == [PNG.decode("utf-8", "replace")]
    utf16 = _write(tmp_path / "b.txt", "hello".encode("utf-16"))
    with pytest.raises(DataError, match="is UTF-16; convert it"):
        list(documents(utf16))


def test_binary_files_of_a_folder_are_skipped_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path / "a.png", PNG)
    _write(tmp_path / "b.txt", b"text")
    _write(tmp_path / "c.txt", b"")
    with caplog.at_level(logging.WARNING, logger="mambakit.data.text"):
        assert list(documents(tmp_path, errors="replace")) == ["text"]
    assert caplog.messages == [f"skipped 1 binary file(s): {tmp_path / 'a.png'}"]


def test_empty_files_and_folders_without_text_are_errors(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        with pytest.raises(DataError, match=f"{name}: is empty"):
            list(documents(_write(tmp_path / name, b"")))
    _write(tmp_path / "a.png", PNG)
    with pytest.raises(DataError, match="no text in any file") as caught:
        list(documents(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b', "line 2: not JSON"),
        ('{"content": "b"}', "line 2: has no 'text', only 'content'; .*--text-key"),
        ("[1]", "line 2: got list, wanted an object with 'text'"),
        ('{"text": null}', "line 2: 'text' is NoneType, wanted a string"),
        ('{"text": "b\\ud800"}', "line 2: character 1 is a lone surrogate"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line.encode())
    with pytest.raises(DataError, match=message):
        list(documents(path))


def test_replace_mends_lone_surrogates(tmp_path: Path) -> None:
    line = json.dumps({"text": "a\ud800b \U0001f600"})
    path = _write(tmp_path / "a.jsonl", line.encode())
    assert list(documents(path, errors="replace")) == ["a\N{REPLACEMENT CHARACTER}b \U0001f600"]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", b"PAR1 no PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file"):
        list(documents(path))


def test_unknown_errors_value() -> None:
    with pytest.raises(ArgumentError, match="errors: got 'ignore'"):
        TextReader("a.txt", errors="ignore")  # type: ignore[arg-type]
