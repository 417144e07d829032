from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tokenizers

from mambakit.data.tokenizer import (
    BytesTokenizer,
    JsonTokenizer,
    Tokenizer,
    load_tokenizer,
    token_dtype,
)
from mambakit.errors import ArgumentError, DataError


def test_bytes_are_ids_and_the_separator_decodes_to_nothing() -> None:
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode("né\0").tolist() == [0x6E, 0xC3, 0xA9, 0]
    assert tokenizer.encode("né").dtype == np.int32
    assert tokenizer.decode_bytes([0xC3, tokenizer.eos_id]) == b"\xc3"
    assert tokenizer.decode([0x6E, 0xC3]) == "n\N{REPLACEMENT CHARACTER}"
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


@pytest.mark.parametrize("wrong", [257, -1])
def test_ids_outside_the_vocabulary_are_named(wrong: int, bpe_file: Path) -> None:
    with pytest.raises(ArgumentError, match=rf"got {wrong}, wanted 0 to 256"):
        BytesTokenizer().decode([65, wrong])
    bpe = load_tokenizer(bpe_file)
    wrong = bpe.vocab_size if wrong > 0 else wrong
    with pytest.raises(ArgumentError, match=f"got {wrong}"):
        bpe.decode_bytes(np.array([1, wrong]))


def test_a_lone_surrogate_is_an_error(bpe_file: Path) -> None:
    for tokenizer in (BytesTokenizer(), load_tokenizer(bpe_file)):
        with pytest.raises(DataError, match="character 2 is a lone surrogate"):
            tokenizer.encode("ab\ud800")


def test_bpe_gives_the_ids_of_the_library_and_the_text_back(bpe_file: Path) -> None:
    tokenizer = load_tokenizer(bpe_file)
    text = "the cat's naïve 帽子\n"
    ids = tokenizer.encode(text)
    assert ids.tolist() == tokenizers.Tokenizer.from_file(str(bpe_file)).encode(text).ids
    assert len(ids) < len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id == 0
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


def test_a_character_in_two_tokens_decodes_byte_by_byte(bpe_file: Path) -> None:
    tokenizer = load_tokenizer(bpe_file)
    ids = tokenizer.encode("帽")
    assert [tokenizer.decode_bytes([i]) for i in ids] == [b"\xe5", b"\xb8", b"\xbd"]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_saved_tokenizers_come_back_the_same(kind: str, bpe_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bpe_file if kind == "bpe" else "bytes")
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("the cat").tolist() == tokenizer.encode("the cat").tolist()


def test_the_separator_comes_from_the_argument_then_the_config_then_usual_names(
    bpe_file: Path, tmp_path: Path
) -> None:
    content = json.loads(bpe_file.read_text(encoding="utf-8"))
    end = len(content["model"]["vocab"])
    content["added_tokens"].append({**content["added_tokens"][0], "id": end, "content": "<end>"})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    usual = load_tokenizer(path)
    assert usual.eos_id == 0
    named = load_tokenizer(path, eos="<end>")
    assert (named.eos_id, named.vocab_size) == (end, end + 1)
    assert named.fingerprint != usual.fingerprint
    for token in ("<end>", {"content": "<end>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}), "utf-8")
        assert load_tokenizer(tmp_path).eos_id == end
    with pytest.raises(DataError, match="no token '<none>'"):
        load_tokenizer(path, eos="<none>")


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token": {}}'])
def test_a_damaged_config_is_named(content: str, bpe_file: Path, tmp_path: Path) -> None:
    load_tokenizer(bpe_file).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: names no eos_token"):
        load_tokenizer(tmp_path)


def test_byte_level_pieces_outside_the_alphabet_are_literal() -> None:
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"\u0120a": 0, "a b": 1, "</s>": 2}))
    raw.decoder = tokenizers.decoders.ByteLevel()
    assert JsonTokenizer(raw.to_str()).decode([0, 1]) == " aa b"


def test_truncation_and_padding_in_the_file_are_switched_off(
    bpe_file: Path, tmp_path: Path
) -> None:
    raw = tokenizers.Tokenizer.from_file(str(bpe_file))
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("the dog ate")) == (
        "the dog ate"
    )


def test_sentencepiece_like_pieces_keep_spaces_and_byte_fallback() -> None:
    vocab = {"<unk>": 0, "</s>": 1, "▁the": 2, "▁cat": 3, "<0xC3>": 4, "<0xA9>": 5}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
    raw.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    tokenizer = JsonTokenizer(raw.to_str())
    assert tokenizer.eos_id == 1
    assert tokenizer.decode([2, 3, 4, 5, 1]) == " the caté"


def test_pieces_without_a_decoder_are_taken_as_they_are() -> None:
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"A": 0, "C": 1, "[EOS]": 2}))
    assert JsonTokenizer(raw.to_str()).decode([1, 0, 0, 2]) == "CAA"


def test_decoders_that_need_context_are_refused() -> None:
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[SEP]": 0}))
    raw.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(DataError, match="decoder WordPiece is not supported"):
        JsonTokenizer(raw.to_str())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable tokenizer.json"),
        ("[1]", "not a Hugging Face tokenizer.json"),
        ('{"format": "other"}', "not a Hugging Face tokenizer.json"),
    ],
)
def test_malformed_files_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_tokenizer_without_a_separator_asks_for_one() -> None:
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"A": 0}))
    with pytest.raises(DataError, match=r"name the one that separates documents \(eos=...\)"):
        JsonTokenizer(raw.to_str())


def test_paths_that_do_not_exist_are_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    for missing in ("missing.json", str(tmp_path / "missing")):
        with pytest.raises(DataError, match="no such file or folder"):
            load_tokenizer(missing)
    with pytest.raises(DataError, match="the folder holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_hub_tokenizers_are_fetched_with_their_config(
    bpe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo: str, name: str) -> str:
        assert repo == "owner/name"
        path = tmp_path / name
        text = bpe_file.read_text(encoding="utf-8")
        path.write_text(text if name == "tokenizer.json" else '{"eos_token": "a"}', "utf-8")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    tokenizer = load_tokenizer("owner/name")
    assert tokenizer.eos_id == tokenizer.encode("a")[0]


def test_an_unreachable_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, name: str) -> str:
        raise ConnectionError("no route\nmore lines")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(DataError, match=r"cannot get owner/name from the hub \(no route\)"):
        load_tokenizer("owner/name")


def test_token_files_use_two_bytes_where_they_suffice() -> None:
    assert [token_dtype(size) for size in (257, 65536, 65537)] == ["<u2", "<u2", "<u4"]
