"""Text to token ids and back.

Two tokenizers: UTF-8 bytes, which needs nothing, and any Hugging Face `tokenizer.json`. Both keep

    decode_bytes(a + b) == decode_bytes(a) + decode_bytes(b)
    decode(ids)         == decode_bytes(ids) read as UTF-8, what is none replaced by U+FFFD

so that text can be streamed one token at a time. The document separator decodes to nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from mambakit.errors import ArgumentError, DataError
from mambakit.files import atomic_write

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Ids: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]]"

_BYTES_FILE = {"format": "mambakit", "tokenizer": "bytes"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Names of the end-of-text token, tried in this order when no tokenizer_config.json names it.
_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>", "[SEP]")


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of mambakit needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eos_id(self) -> int:
        """Id that ends every document, and starts a text that is generated from nothing."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which ids a text gets."""

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of a text, without a document separator."""

    def decode(self, ids: Ids) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Ids) -> bytes:
        """Bytes of ids, possibly ending within a character."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what `load_tokenizer(folder)` needs."""


def load_tokenizer(spec: str | os.PathLike[str] = "bytes", *, eos: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        spec: "bytes", a `tokenizer.json` file, a folder that holds one, or a Hugging Face hub id.
        eos: The token that separates documents. Default: what `tokenizer_config.json` beside the
            tokenizer says, else the usual names ("<|endoftext|>", "</s>", ...).

    Raises:
        DataError: There is no such tokenizer, it is malformed, or no separator is known.

    Example:
        >>> tokenizer = load_tokenizer("bytes")
        >>> tokenizer.encode("né").tolist()
        [110, 195, 169]
        >>> tokenizer.decode([110, 195, 169, tokenizer.eos_id])
        'né'
    """
    if spec == "bytes":
        return BytesTokenizer()
    path = Path(spec)
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{path}: no such file, so the folder holds no tokenizer")
    elif not path.is_file():
        path = _download(os.fspath(spec))
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable tokenizer.json ({error})") from error
    if content == _BYTES_FILE:
        return BytesTokenizer()
    return JsonTokenizer(text, eos or _configured_eos(path), source=str(spec))


class BytesTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 to end a document."""

    vocab_size = 257
    eos_id = 256
    fingerprint = hashlib.sha256(b"mambakit bytes 1").hexdigest()

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """UTF-8 bytes of a text; DataError if it holds a lone surrogate."""
        import numpy as np

        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Ids) -> bytes:
        """Bytes of ids; the document separator has none."""
        import numpy as np

        array = _checked_ids(ids, self.vocab_size)
        return array[array < 256].astype(np.uint8).tobytes()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a `tokenizer.json` that says "bytes"."""
        with atomic_write(Path(folder) / "tokenizer.json") as partial:
            partial.write_text(json.dumps(_BYTES_FILE), encoding="utf-8")


class JsonTokenizer:
    """A Hugging Face `tokenizer.json` (library `tokenizers`).

    Special tokens that occur in a text get their own ids, as in `transformers`; none are added, and
    truncation or padding that the file asks for is switched off.

    Args:
        text: Content of the file.
        eos: The token that separates documents, or None to look for a usual one.
        source: What error messages call it.

    Raises:
        DataError: Malformed, no separator, or a decoder that cannot give bytes token by token
            (byte-level, sentencepiece-like and none can).
    """

    def __init__(self, text: str, eos: str | None = None, source: str = "tokenizer.json") -> None:
        import tokenizers

        self._text = text
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # The Rust library raises bare Exception.
            raise DataError(f"{source}: not a Hugging Face tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._pieces = self._tokenizer.get_vocab(with_added_tokens=True)
        self._style = _decoder_style(json.loads(text).get("decoder"), source)
        self.vocab_size = max(self._pieces.values()) + 1
        self._eos = self._find_eos(eos, source)
        self.eos_id = self._pieces[self._eos]
        self.fingerprint = hashlib.sha256(f"{self._eos}\0{text}".encode()).hexdigest()

    def _find_eos(self, eos: str | None, source: str) -> str:
        for name in _EOS_NAMES if eos is None else (eos,):
            if name in self._pieces:
                return name
        missing = "no end-of-text token of a usual name" if eos is None else f"no token {eos!r}"
        raise DataError(f"{source}: has {missing}; name the one that separates documents (eos=...)")

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of a text; DataError if it holds a lone surrogate."""
        import numpy as np

        try:
            # The batch call, unlike `encode`, lets other threads run and skips the offsets.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except TypeError:
            _utf8(text)
            raise
        return np.array(encoding.ids, dtype=np.int32)

    def decode(self, ids: Ids) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Ids) -> bytes:
        """Bytes of ids; the document separator has none."""
        table = self._bytes_of_id
        return b"".join([table[i] for i in _checked_ids(ids, self.vocab_size).tolist()])

    @cached_property
    def _bytes_of_id(self) -> list[bytes]:
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        table = [b""] * self.vocab_size
        for piece, index in self._pieces.items():
            table[index] = _piece_bytes(piece, "literal" if piece in added else self._style)
        table[self.eos_id] = b""
        return table

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` as it was read, and `tokenizer_config.json` with the separator."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._eos}
        for name, text in (
            ("tokenizer.json", self._text),
            ("tokenizer_config.json", json.dumps(config)),
        ):
            with atomic_write(Path(folder) / name) as partial:
                partial.write_text(text, encoding="utf-8", newline="")


def token_dtype(vocab_size: int) -> str:
    """Dtype of token files for ids below `vocab_size`: little-endian, 2 bytes if they suffice."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text: character {error.start} is a lone surrogate, which no Unicode text may hold; "
            "read the text with errors='replace'"
        ) from error


def _checked_ids(ids: Ids, vocab_size: int) -> npt.NDArray[np.int64]:
    import numpy as np

    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    if array.size and not 0 <= array.min() <= array.max() < vocab_size:
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        raise ArgumentError(f"ids: got {wrong}, wanted 0 to {vocab_size - 1} (the vocabulary)")
    return array


def _decoder_style(decoder: dict[str, Any] | None, source: str) -> str:
    """How a piece of the vocabulary spells bytes: "byte-level", "sentencepiece" or "literal"."""
    parts = [] if decoder is None else decoder.get("decoders", [decoder])
    types = {part["type"] for part in parts}
    if "ByteLevel" in types:
        return "byte-level"
    if types & {"Metaspace", "ByteFallback"} or any(
        "▁" in json.dumps(p, ensure_ascii=False) for p in parts
    ):
        return "sentencepiece"
    if types <= {"Fuse"}:
        return "literal"
    raise DataError(
        f"{source}: decoder {', '.join(sorted(types))} is not supported; "
        "use a byte-level or sentencepiece tokenizer"
    )


def _byte_alphabet() -> dict[str, int]:
    """The characters that GPT-2's byte-level BPE writes for the 256 bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF_CHARACTER = _byte_alphabet()


def _piece_bytes(piece: str, style: str) -> bytes:
    if style == "literal" or (style == "byte-level" and not _BYTE_OF_CHARACTER.keys() >= {*piece}):
        return piece.encode()
    if style == "byte-level":
        return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _configured_eos(path: Path) -> str | None:
    """`eos_token` of the `tokenizer_config.json` beside a `tokenizer.json`."""
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        name: str | None = token["content"] if isinstance(token, dict) else token
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise DataError(f"{config}: names no eos_token that can be read ({error})") from error
    return name


def _download(name: str) -> Path:
    """Fetch `tokenizer.json` and its config from the hub (or its cache on this machine)."""
    wanted = 'wanted "bytes", a tokenizer.json, a folder that holds one, or a Hugging Face hub id'
    if not _HUB_ID.fullmatch(name) or name.endswith(".json"):
        raise DataError(f"tokenizer: {name} is no such file or folder; {wanted}")
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # Many types: offline, not found, gated, proxy.
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"tokenizer: cannot get {name} from the hub ({reason}); {wanted}"
        ) from error
    try:
        huggingface_hub.hf_hub_download(name, "tokenizer_config.json")
    except EntryNotFoundError:
        return path  # Then the usual names of the separator are tried.
    return path
