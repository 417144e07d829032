"""Continue prompts of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from mambakit.errors import ArgumentError
from mambakit.generate.generation import stream
from mambakit.generate.options import SamplingOptions
from mambakit.generate.stopping import TextStream
from mambakit.models.language_model import MambaLanguageModel


class Tokenizer(Protocol):
    """What generation needs of a tokenizer; those of `mambakit.data` have it."""

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


def generate_text(
    model: MambaLanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: SamplingOptions | None = None,
    *,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    seed: int | Sequence[int] | None = None,
) -> list[str]:
    """Continue each prompt; the arguments are those of `stream_text`.

    Returns:
        The continuations, without the prompts and without the stop strings.
    """
    continuations = ["" for _ in prompts]
    for row, text in stream_text(
        model, tokenizer, prompts, options, max_tokens=max_tokens, stop=stop, seed=seed
    ):
        continuations[row] += text
    return continuations


def stream_text(
    model: MambaLanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: SamplingOptions | None = None,
    *,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    seed: int | Sequence[int] | None = None,
) -> Iterator[tuple[int, str]]:
    """Continue each prompt, giving out text as it comes, in whole characters.

    A continuation ends at a stop string, at the end of a document, or after max_tokens.

    Args:
        model: The model.
        tokenizer: The one that the model was trained with.
        prompts: Texts; an empty one starts a new document.
        options: How tokens are chosen. Default: drawn from the model's own distribution.
        max_tokens: Most tokens to add to each prompt.
        stop: Strings that end a continuation, and are not part of it.
        seed: As in `stream`.

    Yields:
        Number of the prompt, and the next piece of its continuation.

    Raises:
        ArgumentError: An argument is out of range, or tokenizer and model do not belong together.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ArgumentError(
            f"tokenizer: has {tokenizer.vocab_size} ids, wanted at most {model.config.vocab_size} "
            "as in the model; use the one that the model was trained with"
        )
    texts = [TextStream(stop) for _ in prompts]
    pieces = ["" for _ in prompts]

    def stops(row: int, token: int) -> bool:
        pieces[row] = texts[row].feed(tokenizer.decode_bytes([token]))
        return texts[row].stopped

    ids = [list(tokenizer.encode(prompt)) or [tokenizer.eos_id] for prompt in prompts]
    tokens = stream(
        model, ids, options,
        max_tokens=max_tokens, stop_ids=[tokenizer.eos_id], seed=seed, until=stops,
    )  # fmt: skip
    for row, _ in tokens:
        if pieces[row]:
            yield row, pieces[row]
    for row, text in enumerate(texts):
        if rest := text.finish():
            yield row, rest
