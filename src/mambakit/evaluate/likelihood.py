"""How likely continuations are after their contexts. What several of them share is read once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.errors import ArgumentError
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.state import ModelState

CHUNK = 2048
"""Positions of a row read at once, which bounds the memory of a long text."""

HEAD_TOKENS = 256
"""Predictions made at once: their logits are the largest tensors."""

CPU_ROWS = 16
"""Continuations of one context read at once on a CPU."""

WORTH_SHARING = 32
"""A context is read by itself if that saves so many tokens: a pass through the model has its own cost."""

Pair = tuple[Sequence[int], Sequence[int]]


class Likelihood(NamedTuple):
    """Of a continuation, given its context."""

    log_prob: float
    """Natural logarithm of its probability."""
    is_greedy: bool
    """Whether every token of it is the likeliest one."""


@dataclass(frozen=True)
class _Row:
    """Tokens that are read, and what is to be predicted at their end."""

    tokens: tuple[int, ...]
    continuations: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    """Number of the pair, and its continuation: all have the same tokens but for the last."""


@dataclass(frozen=True)
class _Group:
    """Rows that begin alike."""

    prefix: tuple[int, ...]
    rows: list[_Row]


def log_likelihoods(
    model: MambaLanguageModel, pairs: Sequence[Pair], batch_size: int = 16
) -> Iterator[tuple[int, Likelihood]]:
    """Sum ln p(token | context, tokens before it) over each continuation.

    A context that several continuations follow is read once; each continuation goes on from a copy
    of the state. Of continuations that differ in their last token only, one is read.

    On a GPU, contexts of equal length are read together, and continuations of any lengths: they are
    padded at the right, which changes nothing before it. The result depends on the batch up to the
    rounding of sums. On a CPU a context is read alone, and then its continuations together, whatever
    batch_size is, so that the result, bit for bit, depends on nothing else.

    Args:
        model: In evaluation mode.
        pairs: Token ids of context and continuation; no context is empty.
        batch_size: Most rows read at once on a GPU.

    Yields:
        The number of a pair and its result, the longest ones first. An empty continuation has
        probability 1.

    Raises:
        ArgumentError: A context is empty, an id is out of range, or batch_size is less than 1.

    Numerics: log-softmax in float32 over the padded vocabulary, sums in float64. A padding id is
    never the likeliest token, as in generation.

    Example:
        >>> from mambakit import MambaConfig, MambaLanguageModel
        >>> model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=8))
        >>> results = dict(log_likelihoods(model, [([1, 2], [3, 4]), ([1, 2], [])]))
        >>> results[0].log_prob < 0, results[1]
        (True, Likelihood(log_prob=0.0, is_greedy=True))
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size: got {batch_size}, wanted at least 1")
    vocab_size = model.config.vocab_size
    for index, (context, continuation) in enumerate(pairs):
        if not context:
            raise ArgumentError(
                f"pairs[{index}]: got an empty context, wanted at least one token; "
                "to start from nothing, give the id that separates documents"
            )
        if wrong := [token for token in continuation if not 0 <= token < vocab_size]:
            raise ArgumentError(
                f"pairs[{index}]: got id {wrong[0]}, wanted 0 <= id < {vocab_size}, "
                "the vocab_size of the model"
            )
        if not continuation:
            yield index, Likelihood(0.0, True)
    contexts, rows = _at_once(next(model.parameters()).device, batch_size)
    groups = sorted(_groups(pairs), key=_length, reverse=True)
    for _, alike in itertools.groupby(groups, key=lambda group: len(group.prefix)):
        while batch := list(itertools.islice(alike, contexts)):
            yield from _score_groups(model, batch, rows)


def _at_once(device: torch.device, batch_size: int) -> tuple[int, int]:
    """How many contexts, and how many rows after them, are read at once."""
    return (1, CPU_ROWS) if device.type == "cpu" else (batch_size, batch_size)


def _groups(pairs: Sequence[Pair]) -> Iterator[_Group]:
    contexts: dict[tuple[int, ...], dict[tuple[int, ...], _Row]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if continuation:
            rows = contexts.setdefault(tuple(context), {})
            read = tuple(continuation[:-1])
            row = rows.setdefault(read, _Row(tokens=read))
            row.continuations.append((index, continuation))
    for known, rows in contexts.items():
        shared = len(known) - 1  # The last token predicts, so it is read with each row.
        if (len(rows) - 1) * shared < WORTH_SHARING:
            shared = 0
        whole = [_Row(known[shared:] + row.tokens, row.continuations) for row in rows.values()]
        yield _Group(known[:shared], whole)


def _length(group: _Group) -> tuple[int, int]:
    return len(group.prefix), max(len(row.tokens) for row in group.rows)


@torch.no_grad()
def _score_groups(
    model: MambaLanguageModel, groups: list[_Group], at_once: int
) -> Iterator[tuple[int, Likelihood]]:
    """Score groups whose prefixes have the same length, so many rows at once."""
    device = next(model.parameters()).device
    state = None
    if groups[0].prefix:
        prefixes = torch.tensor([group.prefix for group in groups], device=device)
        _, state = model.prefill(prefixes, chunk=CHUNK)
    rows = [(place, row) for place, group in enumerate(groups) for row in group.rows]
    rows.sort(key=lambda item: len(item[1].tokens), reverse=True)
    for first in range(0, len(rows), at_once):
        places, batch = zip(*rows[first : first + at_once], strict=True)
        own = None if state is None else state.select(torch.tensor(places, device=device))
        yield from _score_rows(model, batch, own)


def _score_rows(
    model: MambaLanguageModel, rows: Sequence[_Row], state: ModelState | None
) -> Iterator[tuple[int, Likelihood]]:
    """Score rows, the longest first, each after its row of the state."""
    device = next(model.parameters()).device
    padded = torch.zeros(len(rows), len(rows[0].tokens), dtype=torch.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row.tokens)] = torch.tensor(row.tokens)
    wanted = torch.tensor(
        [
            (place, len(row.tokens) - len(continuation) + offset, token)
            for place, row in enumerate(rows)
            for _, continuation in row.continuations
            for offset, token in enumerate(continuation)
        ]
    )
    log_probs = torch.empty(len(wanted), dtype=torch.float64)
    likeliest = torch.empty(len(wanted), dtype=torch.bool)
    for first in range(0, padded.shape[1], CHUNK):
        hidden, state = model.hidden(padded[:, first : first + CHUNK].to(device), state)
        (here,) = torch.where(wanted[:, 1] // CHUNK == first // CHUNK)
        for part in torch.split(here, HEAD_TOKENS):
            which, position, token = wanted[part].to(device).unbind(1)
            values, hits = _predict(model, hidden[which, position - first], token)
            log_probs[part], likeliest[part] = values.double().cpu(), hits.cpu()
    end = 0
    for index, continuation in (item for one in rows for item in one.continuations):
        own = slice(end, end := end + len(continuation))
        yield index, Likelihood(log_probs[own].sum().item(), bool(likeliest[own].all()))


def _predict(model: MambaLanguageModel, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens (n,) after hidden vectors (n, M), and whether each is likeliest."""
    logits = model.lm_head(hidden[None])[0].float()
    log_probs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return log_probs, logits[:, : model.config.vocab_size].argmax(-1) == tokens
