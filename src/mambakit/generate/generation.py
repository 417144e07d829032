"""Continue prompts of token ids, several at once."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mambakit.errors import ArgumentError
from mambakit.generate.engine import Engine
from mambakit.generate.handle import Handle
from mambakit.generate.options import SamplingOptions
from mambakit.generate.request import Output, Prompt, Request, token_ids
from mambakit.generate.tokenizer import Tokenizer
from mambakit.models.language_model import MambaLanguageModel

MOST_SLOTS = 256
"""So many prompts are continued at once; more wait until others have ended."""

CHUNK = 2048
"""Tokens of a prompt read at once. Nobody else waits, so it is what is fastest."""

WORTH_CAPTURING, PROMPTS_WORTH_CAPTURING = 64, 32
"""On a GPU it takes the time of about so many steps to capture the graphs of the engine's steps; and of so many prompts
to capture those that read them."""


def generate(
    model: MambaLanguageModel,
    prompts: Sequence[Prompt],
    options: SamplingOptions | None = None,
    *,
    max_tokens: int = 256,
    stop_ids: Sequence[int] = (),
    seed: int | Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each prompt; the arguments are those of `stream`.

    Returns:
        The continuations, without the prompts and without the stop ids. After a Ctrl-C: what there
        is of them.

    Example:
        >>> from mambakit import MambaConfig, MambaLanguageModel
        >>> model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=8))
        >>> greedy = SamplingOptions(temperature=0)
        >>> [len(tokens) for tokens in generate(model, [[1, 2, 3], [4]], greedy, max_tokens=5)]
        [5, 5]
    """
    requests = requests_of(
        model, prompts, options, max_tokens=max_tokens, stop_ids=stop_ids, seed=seed
    )
    if not requests:
        return []
    engine = engine_for(model, len(requests), max_tokens)
    return [completion.tokens for completion in engine.generate(requests)]


def stream(
    model: MambaLanguageModel,
    prompts: Sequence[Prompt],
    options: SamplingOptions | None = None,
    *,
    max_tokens: int = 256,
    stop_ids: Sequence[int] = (),
    seed: int | Sequence[int] | None = None,
    until: Callable[[int, int], bool] | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue each prompt, giving out every token as it comes.

    All prompts are continued together by an `Engine`; those that have ended leave the batch. On the
    CPU a prompt is continued, token for token, as it would be alone with the same seed; on an
    accelerator up to the rounding of sums, which may depend on the size of the batch.

    Args:
        model: The model.
        prompts: Token ids; of any lengths, but none empty.
        options: How tokens are chosen. Default: drawn from the model's own distribution.
        max_tokens: Most tokens to add to each prompt.
        stop_ids: Ids that end a continuation, and are not part of it.
        seed: Prompt i is sampled with seed + i; or one seed for each prompt. Default: another one
            every time.
        until: Called with the number of the prompt and its new token; true ends that continuation
            after this token.

    Yields:
        Number of the prompt, and its next token.

    Raises:
        ArgumentError: An argument is out of range, or the logits are not finite.
    """
    requests = requests_of(
        model, prompts, options, max_tokens=max_tokens, stop_ids=stop_ids, seed=seed
    )
    return _tokens(model, requests, max_tokens, until)


def _tokens(
    model: MambaLanguageModel,
    requests: list[Request],
    max_tokens: int,
    until: Callable[[int, int], bool] | None,
) -> Iterator[tuple[int, int]]:
    if not requests:
        return
    engine = engine_for(model, len(requests), max_tokens)
    handles = [engine.submit(request) for request in requests]
    ended = [False] * len(handles)
    for row, output in outputs_of(engine, handles):
        if output.token is not None and not ended[row]:
            if until is not None and until(row, output.token):
                ended[row] = True
                handles[row].cancel()
            yield row, output.token


def engine_for(
    model: MambaLanguageModel, count: int, max_tokens: int, tokenizer: Tokenizer | None = None
) -> Engine:
    """An engine for so many prompts, used once."""
    return Engine(
        model,
        slots=min(count, MOST_SLOTS),
        tokenizer=tokenizer,
        chunk=CHUNK,
        cuda_graphs=max_tokens > WORTH_CAPTURING,
        prompt_graphs=count > PROMPTS_WORTH_CAPTURING,
    )


def outputs_of(engine: Engine, handles: Sequence[Handle]) -> Iterator[tuple[int, Output]]:
    """What comes of several requests: the number of each and its output, at most one token a step."""
    goes_on = True
    while goes_on:
        goes_on = engine.step()
        for row, handle in enumerate(handles):
            for output in handle.poll():
                yield row, output
    for handle in handles:
        handle.result()  # Raises what went wrong, if it came together with an output.


def requests_of(
    model: MambaLanguageModel,
    prompts: Sequence[Prompt],
    options: SamplingOptions | None,
    *,
    seed: int | Sequence[int] | None,
    **fields: Any,
) -> list[Request]:
    """A request for each prompt of ids; prompt i has seed + i. `fields` are those of `Request`."""
    vocab_size = model.config.vocab_size
    seeds = _seeds(seed, len(prompts))
    ids = [token_ids(f"prompts[{row}]", prompt, vocab_size) for row, prompt in enumerate(prompts)]
    options = options or SamplingOptions()
    Request(prompt=[0], **fields)  # Wrong fields are refused even if there is no prompt.
    return [
        Request(prompt=prompt, options=options, seed=one, **fields)
        for prompt, one in zip(ids, seeds, strict=True)
    ]


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        seed = secrets.randbits(48)
    seeds = [seed + row for row in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count or not all(0 <= value < 2**63 for value in seeds):
        raise ArgumentError(
            f"seed: got {seed}, wanted one from 0 to 2**63 - 1, or one for each of {count} prompts"
        )
    return seeds
