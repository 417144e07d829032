"""A tokenizer in a GGUF file, as far as llama.cpp has the like."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambakit.errors import ConfigError
from mambakit.models.formats.layout import SavedTokenizer

if TYPE_CHECKING:
    import gguf

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_THREE = {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated"}
SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "falcon": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        _BYTES,
        {"type": "Digits", "individual_digits": False},
        {**_THREE, "invert": False},
    ],
}
"""llama.cpp's names for the steps in which a text is split before BPE, and those in a tokenizer.json."""


def add_vocabulary(
    writer: gguf.GGUFWriter, tokenizer: SavedTokenizer | None, vocab_size: int
) -> None:
    """Write a vocabulary of `vocab_size` tokens; ids that the tokenizer does not have are unused.

    Raises:
        ConfigError: llama.cpp has no tokenizer like this one, or it has more ids than the model.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(vocab_size)
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        content = json.loads(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))
    if content.get("tokenizer") == "bytes":
        _add_bytes(writer, vocab_size)
    else:
        _add_bpe(writer, content, vocab_size)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(False)


def _add_bpe(writer: gguf.GGUFWriter, content: dict[str, Any], vocab_size: int) -> None:
    model = content["model"]
    split = content.get("pre_tokenizer") or {"pretokenizers": []}
    steps = split.get("pretokenizers", [split])
    names = [name for name, wanted in SPLITS.items() if _are(steps, wanted)]
    if model.get("type") != "BPE" or not names:
        raise ConfigError(
            f"tokenizer: llama.cpp has nothing known here for {model.get('type')} after "
            f"{' and '.join(step['type'] for step in steps) or 'no split'}; leave the tokenizer out"
        )
    from gguf import TokenType

    ids = {index: (piece, TokenType.NORMAL) for piece, index in model["vocab"].items()}
    for token in content.get("added_tokens", []):
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        ids[token["id"]] = token["content"], kind
    _add_tokens(writer, ids, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(names[0])
    # Older files have a merge as a string, newer ones as a pair.
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])


def _are(steps: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    """Whether steps of splitting are those that are wanted; older files do not say use_regex."""
    return len(steps) == len(wanted) and all(
        want.items() <= {"use_regex": True, **step}.items()
        for step, want in zip(steps, wanted, strict=True)
    )


def _add_bytes(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Ids that are bytes: for the tokenizer of RWKV a vocabulary as any other, written with escapes."""
    from gguf import TokenType

    ids = {byte: (f"\\x{byte:02x}", TokenType.NORMAL) for byte in range(256)}
    ids[256] = "<|endoftext|>", TokenType.CONTROL
    _add_tokens(writer, ids, vocab_size)
    writer.add_tokenizer_model("rwkv")


def _add_tokens(writer: gguf.GGUFWriter, ids: dict[int, tuple[str, Any]], vocab_size: int) -> None:
    from gguf import TokenType

    if max(ids) >= vocab_size:
        raise ConfigError(
            f"tokenizer: has ids up to {max(ids)}, wanted below {vocab_size}, the vocabulary of the "
            "model; give the tokenizer that it was trained with"
        )
    tokens = [ids.get(index, (f"[PAD{index}]", TokenType.UNUSED)) for index in range(vocab_size)]
    writer.add_token_list([piece for piece, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
