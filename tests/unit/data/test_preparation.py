from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mambakit.data import preparation
from mambakit.data import text as text_module
from mambakit.data.dataset import TokenDataset
from mambakit.data.manifest import Manifest
from mambakit.data.preparation import Progress, prepare
from mambakit.data.tokenizer import BytesTokenizer, load_tokenizer
from mambakit.errors import ArgumentError, DataError


def _jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def _texts(dataset: TokenDataset) -> list[str]:
    tokenizer = dataset.tokenizer()
    borders = [0, *dataset.document_ends.tolist()]
    return [tokenizer.decode(dataset.tokens[a:b]) for a, b in itertools.pairwise(borders)]


def test_documents_become_tokens_with_a_separator_each(tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "a.jsonl", ["né", "b"])
    manifest = prepare(source, tmp_path / "out", valid_fraction=0)
    dataset = TokenDataset(tmp_path / "out")
    assert dataset.tokens.tolist() == [110, 195, 169, 256, 98, 256]
    assert dataset.tokens.dtype == np.uint16
    assert dataset.document_ends.tolist() == [4, 6]
    assert dataset.text_bytes == 4
    assert manifest == Manifest.load(tmp_path / "out")
    assert manifest.sources == [str(source)]
    assert (manifest.vocab_size, manifest.eos_id) == (257, 256)
    assert manifest.fingerprint == BytesTokenizer.fingerprint
    assert sorted(os.listdir(tmp_path / "out")) == [
        "manifest.json",
        "tokenizer.json",
        "train.bin",
        "train.documents.bin",
    ]


def test_many_documents_are_split_by_hash_and_stay_where_they_are(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(2000)]
    prepare(_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "a", valid_fraction=0.1)
    train, valid = (_texts(TokenDataset(tmp_path / "a", split)) for split in ("train", "valid"))
    assert sorted(train + valid) == sorted(texts)
    assert 130 < len(valid) < 270  # Five standard deviations around 200.
    more = [f"new {i}" for i in range(100)] + texts + texts[:50]
    prepare(_jsonl(tmp_path / "b.jsonl", more), tmp_path / "b", valid_fraction=0.1)
    assert set(valid) <= set(_texts(TokenDataset(tmp_path / "b", "valid")))
    assert set(train) <= set(_texts(TokenDataset(tmp_path / "b", "train")))


def test_of_one_document_the_end_is_for_validation(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    manifest = prepare(tmp_path / "a.txt", tmp_path / "out", valid_fraction=0.1)
    train, valid = (TokenDataset(tmp_path / "out", split) for split in ("train", "valid"))
    assert _texts(train) == [text[:901]]
    assert _texts(valid) == [text[901:]]
    assert valid.tokens[-1] == 256
    assert [manifest.splits[s].text_bytes for s in ("train", "valid")] == [901, 99]
    assert [manifest.splits[s].documents for s in ("train", "valid")] == [1, 1]


@pytest.mark.parametrize("valid_fraction", [0.2, 0.5, 0.9])
def test_a_few_documents_are_split_to_size(tmp_path: Path, valid_fraction: float) -> None:
    texts = [character * 30 for character in "abcdefg"]
    manifest = prepare(
        _jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out", valid_fraction=valid_fraction
    )
    share = manifest.splits["valid"].tokens / (7 * 31)
    assert valid_fraction / 2 <= share <= valid_fraction * 2
    train, valid = (TokenDataset(tmp_path / "out", split) for split in ("train", "valid"))
    assert train.text_bytes + valid.text_bytes == 7 * 30
    both = [*_texts(train), *_texts(valid)]
    assert sorted("".join(both)) == sorted("".join(texts))
    assert all(ends[-1] == len(d) for d in (train, valid) for ends in [d.document_ends])


def test_the_result_does_not_depend_on_workers_or_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for i in range(20):
        text = "".join(rng.choice(list("ab é\n"), 3000))
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8", newline="")
    prepare(str(tmp_path / "*.txt"), tmp_path / "one", workers=1)
    monkeypatch.setattr(text_module, "PIECE_BYTES", 256)
    monkeypatch.setattr(preparation, "PIECE_BYTES", 256)
    prepare(str(tmp_path / "*.txt"), tmp_path / "many", workers=3)
    for name in ("train.bin", "train.documents.bin", "valid.bin", "valid.documents.bin"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_content_names_the_tokens_wherever_they_lie(tmp_path: Path, bpe_file: Path) -> None:
    one = _jsonl(tmp_path / "a.jsonl", ["the cat", "the dog"])
    same = _jsonl(tmp_path / "b.jsonl", ["the cat", "the dog"])
    other = _jsonl(tmp_path / "c.jsonl", ["the cat", "the", " dog"])
    content = prepare(one, tmp_path / "out").content
    assert prepare(same, tmp_path / "out").content == content
    assert prepare(other, tmp_path / "out").content != content
    assert prepare(one, tmp_path / "out", load_tokenizer(bpe_file)).content != content
    assert prepare(one, tmp_path / "out", valid_fraction=0.3).content != content


def test_bpe_tokens_decode_to_the_text(tmp_path: Path, bpe_file: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat, naïvely\n" * 50, encoding="utf-8", newline="")
    prepare(tmp_path / "a.txt", tmp_path / "out", str(bpe_file), valid_fraction=0.2)
    train, valid = (TokenDataset(tmp_path / "out", split) for split in ("train", "valid"))
    tokenizer = train.tokenizer()
    text = tokenizer.decode_bytes(train.tokens) + tokenizer.decode_bytes(valid.tokens)
    assert text.decode() == "the cat sat, naïvely\n" * 50
    assert train.text_bytes + valid.text_bytes == len(text)
    assert len(valid) == int(0.2 * (len(train) + len(valid)))


def test_reading_waits_for_tokenising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "PIECE_BYTES", 100)
    monkeypatch.setattr(preparation, "PIECE_BYTES", 400)
    (tmp_path / "a.txt").write_text("x" * 100_000, encoding="utf-8")
    reader = text_module.TextReader(tmp_path / "a.txt")
    results = preparation._tokenised(reader, BytesTokenizer(), workers=2)
    done = sum(piece.text_bytes for piece in next(results))
    # One task is done, four wait or run; files are read ahead by some kilobytes.
    assert 0 < done <= 200
    assert reader.position <= 50_000


def test_progress_counts_up_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 700_000, encoding="utf-8")
    (tmp_path / "b.txt").write_text("y" * 300_000, encoding="utf-8")
    calls: list[Progress] = []
    prepare(str(tmp_path / "*.txt"), tmp_path / "out", workers=1, progress=calls.append)
    assert calls[-1] == Progress(documents=2, tokens=1_000_002, position=1_000_000, size=1_000_000)
    assert [call.tokens for call in calls] == [700_001, 1_000_002]


def test_out_must_be_new_empty_or_prepared_before(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("some text", encoding="utf-8")
    for out in (tmp_path, source):
        with pytest.raises(DataError, match="choose a new or empty folder"):
            prepare(source, out)
    assert source.read_text(encoding="utf-8") == "some text"
    (tmp_path / "out").mkdir()
    prepare(source, tmp_path / "out")
    source.write_text("other text", encoding="utf-8")
    prepare(source, tmp_path / "out", valid_fraction=0)
    assert _texts(TokenDataset(tmp_path / "out")) == ["other text"]


def test_what_else_lies_in_a_prepared_folder_is_not_lost(tmp_path: Path) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("some text", encoding="utf-8")
    prepare(source, out)
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds something else \(notes.txt\), which would be lost"):
        prepare(source, out)
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "good"}\nbad', encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        prepare(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_kill_leaves_no_folder_that_looks_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 3_000_000, encoding="utf-8")
    script = (
        "import os, sys\n"
        "from mambakit.data.preparation import prepare\n"
        "prepare(sys.argv[1], sys.argv[2], progress=lambda p: os._exit(9))\n"
    )
    arguments = [str(tmp_path / "a.txt"), str(tmp_path / "out")]
    assert subprocess.run([sys.executable, "-c", script, *arguments]).returncode == 9
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"valid_fraction": 1.0}, "valid_fraction: got 1.0"),
        ({"valid_fraction": -0.1}, "valid_fraction: got -0.1"),
        ({"workers": 0}, "workers: got 0"),
    ],
)
def test_options_out_of_range(option: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        prepare(tmp_path / "a.txt", tmp_path / "out", **option)  # type: ignore[arg-type]
