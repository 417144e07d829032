"""What the engine is asked for, and what it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from mambakit.errors import ArgumentError
from mambakit.generate.options import SamplingOptions
from mambakit.generate.stopping import TextStream

if TYPE_CHECKING:
    from mambakit.generate.prefix import Prefix

Prompt = Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt to continue, and how.

    Raises:
        ArgumentError: A field is outside its range.
    """

    prompt: Prompt | str
    """Token ids, at least one; or a text, if the engine has a tokenizer (an empty one starts a new
    document)."""
    options: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    """How tokens are chosen. Default: drawn from the model's own distribution."""
    max_tokens: int = 256
    """Most tokens to add."""
    stop_ids: Sequence[int] | None = None
    """Ids that end the continuation, and are not part of it. Default: the tokenizer's separator of
    documents, if the engine has a tokenizer."""
    stop: Sequence[str] = ()
    """Texts that end the continuation, and are not part of it; the engine needs a tokenizer."""
    seed: int | None = None
    """Seed of the random numbers, from 0 to 2**63 - 1. Default: another one every time."""
    logprobs: int | None = None
    """If given, the log-probability of each token is recorded, and those of so many likeliest ids."""
    prefix: Prefix | None = None
    """What was read before the prompt. Default: nothing."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ArgumentError(f"max_tokens: got {self.max_tokens}, wanted at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ArgumentError(f"seed: got {self.seed}, wanted one from 0 to 2**63 - 1")
        if self.logprobs is not None and self.logprobs < 0:
            raise ArgumentError(f"logprobs: got {self.logprobs}, wanted at least 0, or None")
        TextStream(self.stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """A token as it comes. The last of a request may be text alone, which had been held back."""

    token: int | None
    """Id; None: only text."""
    text: str = ""
    """Text that is certain by now, if the engine has a tokenizer."""
    logprob: float | None = None
    """Natural logarithm of the token's probability under the model, before any option."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """The likeliest ids and their logprobs, as many as the request asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A continuation: whole, or what there was of it when it was cancelled."""

    outputs: list[Output]
    """Everything that was given out, in order."""
    finish_reason: Literal["stop", "length", "cancelled"]
    """A stop id or stop string came; max_tokens is reached; or it was cancelled or stopped."""
    reused_tokens: int
    """How many tokens of the prompt the prefix cache had already."""

    @property
    def tokens(self) -> list[int]:
        """Ids, without the prompt and the stop id; those of a stop string are among them."""
        return [output.token for output in self.outputs if output.token is not None]

    @property
    def text(self) -> str:
        """The text, without the stop string; empty without a tokenizer."""
        return "".join(output.text for output in self.outputs)


def token_ids(name: str, prompt: Any, vocab_size: int) -> list[int]:
    """The ids of a prompt, as a list.

    Raises:
        ArgumentError: It is empty, or not a sequence of ids; the message begins with `name`.
    """
    if isinstance(prompt, (int, str)):
        raise ArgumentError(f"{name}: got {prompt!r}, wanted a list of token ids")
    ids = [int(token) for token in (prompt.tolist() if hasattr(prompt, "tolist") else prompt)]
    if not ids:
        raise ArgumentError(
            f"{name}: got no tokens, wanted at least one; "
            "to start from nothing, give the id that separates documents"
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise ArgumentError(
            f"{name}: got id {wrong}, wanted 0 <= id < {vocab_size}, the vocab_size of the model"
        )
    return ids
