"""Continue prompts of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mambakit.generate.generation import engine_for, outputs_of, requests_of
from mambakit.generate.options import SamplingOptions
from mambakit.generate.request import Request
from mambakit.generate.tokenizer import Tokenizer, check_tokenizer
from mambakit.models.language_model import MambaLanguageModel


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
        The continuations, without the prompts and without the stop strings. After a Ctrl-C: what
        there is of them.
    """
    requests = _requests(model, tokenizer, prompts, options, max_tokens, stop, seed)
    if not requests:
        return []
    engine = engine_for(model, len(requests), max_tokens, tokenizer)
    return [completion.text for completion in engine.generate(requests)]


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
    requests = _requests(model, tokenizer, prompts, options, max_tokens, stop, seed)
    return _pieces(model, tokenizer, requests, max_tokens)


def _requests(
    model: MambaLanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: SamplingOptions | None,
    max_tokens: int,
    stop: Sequence[str],
    seed: int | Sequence[int] | None,
) -> list[Request]:
    check_tokenizer(tokenizer, model.config.vocab_size)
    ids = [list(tokenizer.encode(prompt)) or [tokenizer.eos_id] for prompt in prompts]
    return requests_of(model, ids, options, max_tokens=max_tokens, stop=stop, seed=seed)


def _pieces(
    model: MambaLanguageModel, tokenizer: Tokenizer, requests: list[Request], max_tokens: int
) -> Iterator[tuple[int, str]]:
    if not requests:
        return
    engine = engine_for(model, len(requests), max_tokens, tokenizer)
    handles = [engine.submit(request) for request in requests]
    for row, output in outputs_of(engine, handles):
        if output.text:
            yield row, output.text
