"""Continue prompts of token ids, several at once."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mambakit.errors import ArgumentError
from mambakit.generate.options import SamplingOptions
from mambakit.generate.sampling import sample
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.state import ModelState

Prompt = Sequence[int]


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
        The continuations, without the prompts and without the stop ids.

    Example:
        >>> from mambakit import MambaConfig, MambaLanguageModel
        >>> model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=8))
        >>> greedy = SamplingOptions(temperature=0)
        >>> [len(tokens) for tokens in generate(model, [[1, 2, 3], [4]], greedy, max_tokens=5)]
        [5, 5]
    """
    continuations: list[list[int]] = [[] for _ in prompts]
    for row, token in stream(
        model, prompts, options, max_tokens=max_tokens, stop_ids=stop_ids, seed=seed
    ):
        continuations[row].append(token)
    return continuations


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

    Each prompt is read alone, then all are continued together; those that have ended leave the
    batch. On the CPU a prompt is continued, token for token, as it would be alone with the same
    seed; on an accelerator up to the rounding of sums, which may depend on the size of the batch.

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
    if max_tokens < 1:
        raise ArgumentError(f"max_tokens: got {max_tokens}, wanted at least 1")
    vocab_size = model.config.vocab_size
    checked = [_checked(number, prompt, vocab_size) for number, prompt in enumerate(prompts)]
    seeds = _seeds(seed, len(prompts))
    options = options or SamplingOptions()
    return _stream(model, checked, seeds, options, max_tokens, frozenset(stop_ids), until)


@dataclasses.dataclass
class _Batch:
    """The sequences that are still being continued."""

    rows: list[int]
    generators: list[torch.Generator]
    logits: Tensor
    state: ModelState
    seen: Tensor

    def select(self, places: list[int]) -> _Batch:
        index = torch.tensor(places, device=self.logits.device)
        return _Batch(
            [self.rows[place] for place in places],
            [self.generators[place] for place in places],
            self.logits[index],
            self.state.select(index),
            self.seen[index],
        )


def _stream(
    model: MambaLanguageModel,
    prompts: list[list[int]],
    seeds: list[int],
    options: SamplingOptions,
    max_tokens: int,
    stop_ids: frozenset[int],
    until: Callable[[int, int], bool] | None,
) -> Iterator[tuple[int, int]]:
    if not prompts:
        return
    batch = _read(model, prompts, seeds)
    for count in range(1, max_tokens + 1):
        tokens = sample(batch.logits, options, batch.generators, batch.seen)
        going_on = []
        for place, (row, token) in enumerate(zip(batch.rows, tokens.tolist(), strict=True)):
            if token not in stop_ids:
                ends = until is not None and until(row, token)
                yield row, token
                going_on += [] if ends else [place]
        if not going_on or count == max_tokens:
            return
        if len(going_on) < len(batch.rows):
            batch, tokens = batch.select(going_on), tokens[going_on]
        batch.seen.scatter_(1, tokens[:, None], True)
        batch.logits = model.step(tokens, batch.state)[:, : model.config.vocab_size]


def _read(model: MambaLanguageModel, prompts: list[list[int]], seeds: list[int]) -> _Batch:
    device = model.backbone.norm_f.weight.device
    vocab_size = model.config.vocab_size
    logits, states = [], []
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        tokens = torch.tensor([prompt], device=device)
        seen[row, tokens[0]] = True
        last, state = model.prefill(tokens)
        logits.append(last[:, :vocab_size])
        states.append(state)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = list(range(len(prompts)))
    return _Batch(rows, generators, torch.cat(logits), ModelState.cat(states), seen)


def _checked(number: int, prompt: Prompt, vocab_size: int) -> list[int]:
    if isinstance(prompt, (int, str)):
        raise ArgumentError(
            f"prompts[{number}]: got {prompt!r}, wanted a list of token ids; prompts holds lists"
        )
    ids = [int(token) for token in prompt]
    if not ids:
        raise ArgumentError(
            f"prompts[{number}]: got no tokens, wanted at least one; "
            "to start from nothing, give the id that separates documents"
        )
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ArgumentError(
                f"prompts[{number}]: got id {token}, wanted 0 <= id < {vocab_size}, "
                "the vocab_size of the model"
            )
    return ids


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        seed = secrets.randbits(48)
    seeds = [seed + row for row in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count or not all(0 <= value < 2**63 for value in seeds):
        raise ArgumentError(
            f"seed: got {seed}, wanted one from 0 to 2**63 - 1, or one for each of {count} prompts"
        )
    return seeds
