"""What generation needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from mambakit.errors import ArgumentError


class Tokenizer(Protocol):
    """Turns text into ids and back; those of `mambakit.data` do."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eos_id(self) -> int:
        """Id that separates documents."""

    def encode(self, text: str) -> Iterable[int]:
        """Ids of a text."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ids; those of a + b are those of a, then those of b."""


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ArgumentError unless the model has all ids of the tokenizer."""
    if tokenizer.vocab_size > vocab_size:
        raise ArgumentError(
            f"tokenizer: has {tokenizer.vocab_size} ids, wanted at most {vocab_size} "
            "as in the model; use the one that the model was trained with"
        )
