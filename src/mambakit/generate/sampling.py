"""From logits to tokens, for many sequences at once, each with options of its own."""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mambakit.generate.options import SamplingOptions
from mambakit.generate.randomness import key_of, uniform
from mambakit.ops.cpu.threads import serial
from mambakit.ops.likeliest import NOT_FINITE, likeliest

FIRST_TRY = 1024
"""On a CPU top-p first looks at so many ids: sorting the whole vocabulary takes a fifth of a small model's step."""


class Method(enum.IntEnum):
    """How much there is to do; each does what those before it do as well, with the same result."""

    GREEDY = 0
    """The likeliest token."""
    DRAW = 1
    """Repetition penalty, temperature and min-p."""
    CUT = 2
    """Top-k and top-p, which sort the vocabulary."""

    @staticmethod
    def of(options: SamplingOptions) -> Method:
        """The least that these options need."""
        if options.temperature == 0:
            return Method.GREEDY if options.repetition_penalty == 1 else Method.DRAW
        return Method.CUT if options.top_k is not None or options.top_p < 1 else Method.DRAW


class SamplingRows(NamedTuple):
    """Options and random numbers of B sequences, where the logits are.

    Attributes:
        reals: Repetition penalty, temperature, top-p and min-p, (B, 4), float32; 2 is no top-p.
        integers: Top-k, key and position, (B, 3), int64. The key is that of the seed; the position
            is the number of tokens in front of the one to choose.
    """

    reals: Tensor
    integers: Tensor

    @staticmethod
    def of(options: SamplingOptions, vocab_size: int, seed: int, position: int) -> SamplingRows:
        """The row of one sequence, on the CPU."""
        # A sum of probabilities may reach 1 by rounding before the last id.
        top_p = options.top_p if options.top_p < 1 else 2.0
        reals = (options.repetition_penalty, options.temperature, top_p, options.min_p)
        top_k = min(options.top_k or vocab_size, vocab_size)
        return SamplingRows(torch.tensor([reals]), torch.tensor([[top_k, key_of(seed), position]]))

    def slice(self, first: int, last: int) -> SamplingRows:
        """Some of the rows, as views."""
        return SamplingRows(self.reals[first:last], self.integers[first:last])


@serial
def sample(
    logits: Tensor, rows: SamplingRows, method: Method, seen: Tensor | None = None
) -> Tensor:
    """Choose a token for each sequence. Nothing here waits for an accelerator.

    Args:
        logits: (B, V), any float dtype.
        rows: Options of each sequence.
        method: At least what the options of each sequence need.
        seen: Ids that the repetition penalty applies to, (B, V), bool. Default: none.

    Returns:
        Token ids, (B,), int64; `NOT_FINITE` where the logits are not. A token is a function of its
        logits, options, seed and position, on the CPU bit for bit: besides operations on single
        numbers that IEEE 754 rounds exactly there are only softmax and cumsum, which go row by row.
    """
    if method is Method.GREEDY:
        return likeliest(logits)
    logits = logits.float()
    penalty, temperature = rows.reals[:, :1], rows.reals[:, 1]
    if seen is not None:
        logits = penalise(logits, penalty, seen)
    tokens = likeliest(logits)
    cumulative = probabilities(logits, rows, method).double().cumsum(dim=-1)
    # As a multiple of 2^-32 times the total it stays under the total after rounding.
    threshold = uniform(rows.integers[:, 1], rows.integers[:, 2])[:, None] * cumulative[:, -1:]
    # The first id whose cumulative probability exceeds it; it has a positive one itself.
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    return torch.where((temperature > 0) & (tokens != NOT_FINITE), drawn, tokens)


def probabilities(logits: Tensor, rows: SamplingRows, method: Method = Method.CUT) -> Tensor:
    """What the next token is drawn from, (B, V) float32: after temperature, top-k, top-p and min-p.

    Numbers in proportion to probabilities: what is taken away is not made up for.

    Args:
        logits: (B, V), float32, with the repetition penalty already applied.
        rows: Options; a temperature of 0 counts as 1.
        method: `Method.DRAW` leaves out top-k and top-p.
    """
    temperature, top_p, min_p = (rows.reals[:, i : i + 1] for i in (1, 2, 3))
    # From the peak down, no temperature is small enough to overflow.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probs = (logits / torch.where(temperature > 0, temperature, 1)).softmax(dim=-1)
    if method is Method.CUT:
        probs = _cut(probs, rows.integers[:, :1], top_p)
    return probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0)


def _cut(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities, (B, V), without those out of the top k, and then out of the nucleus."""
    vocab_size = count = probs.shape[-1]
    has_k, has_p = top_k < vocab_size, top_p <= 1
    if probs.device.type == "cpu":  # Elsewhere to look at numbers would be to wait for them.
        count = min(max(FIRST_TRY, int(torch.where(has_k, top_k, 1).max())), vocab_size)
    while True:
        largest = _largest(probs, count)
        last = top_k.clamp(max=count) - 1
        kth = torch.where(has_k, largest.gather(1, last), 0)
        total = torch.where(largest < kth, 0, largest).cumsum(dim=-1)
        wanted = top_p * torch.where(has_k, total.gather(1, last), 1)
        if count == vocab_size or bool(((total[:, -1:] >= wanted) | ~has_p).all()):
            break
        count = vocab_size
    # The nucleus are the largest until they reach what is wanted, together with ties of the last.
    is_within = pad(total[:, :-1], (1, 0)) < wanted
    smallest = torch.where(is_within, largest, torch.inf).amin(dim=-1, keepdim=True)
    return torch.where(probs < torch.maximum(kth, torch.where(has_p, smallest, 0)), 0, probs)


def _largest(probs: Tensor, count: int) -> Tensor:
    """The largest numbers of each row, (B, count), in descending order."""
    if count < probs.shape[-1] or probs.device.type != "cpu":
        return probs.topk(count).values
    # NumPy sorts with vectors, in a quarter of the time.
    return torch.from_numpy(np.sort(probs.detach().numpy(), axis=-1)).flip(-1)


def penalise(logits: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    """Make seen ids less likely: divide their logits, (B, V), or multiply the negative ones."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@serial
def log_probabilities(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logarithms of probabilities under the model itself, before any option.

    Args:
        logits: (B, V), any float dtype.
        tokens: (B,); `NOT_FINITE` is allowed.
        count: How many of the likeliest ids to give as well.

    Returns:
        That of each token, (B,), and those of the likeliest ids, (B, count), and the ids.
    """
    logs = logits.float().log_softmax(dim=-1)
    chosen = logs.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1)
    values, ids = logs.topk(count)
    return chosen, values, ids
