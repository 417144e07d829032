"""From logits to tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambakit.errors import ArgumentError
from mambakit.generate.options import SamplingOptions

FIRST_TRY = 1024
"""Top-p first looks at so many ids: sorting the whole vocabulary takes a fifth of a small model's step."""


def sample(
    logits: Tensor,
    options: SamplingOptions,
    generators: Sequence[torch.Generator],
    seen: Tensor | None = None,
) -> Tensor:
    """Choose a token for each sequence.

    Args:
        logits: (B, V), any float dtype.
        options: How to choose.
        generators: Source of randomness of each sequence, on the CPU whatever the device of the
            logits. Each token takes one number, so a sequence does not depend on its neighbours.
        seen: Ids that the repetition penalty applies to, (B, V), bool.

    Returns:
        Token ids, (B,), int64.

    Raises:
        ArgumentError: The logits of a sequence hold NaN or +inf, or -inf only.
    """
    logits = penalise(logits.float(), options.repetition_penalty, seen)
    peak, likeliest = logits.max(dim=-1)
    if not bool(torch.isfinite(peak).all()):
        raise ArgumentError(
            "logits: got NaN or infinite numbers, wanted finite ones; "
            "the weights are damaged, or overflow in their dtype (try float32)"
        )
    if options.temperature == 0:
        return likeliest
    cumulative = probabilities(logits, options).double().cumsum(dim=-1)
    # Single precision draws, so that the product below stays under the total after rounding.
    drawn = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    threshold = drawn.to(cumulative)[:, None] * cumulative[:, -1:]
    # The first id whose cumulative probability exceeds the threshold; it has a positive one itself.
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)


def probabilities(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Distribution over the next token, (B, V) float32, after temperature, top-k, top-p and min-p.

    Args:
        logits: (B, V), float32, with the repetition penalty already applied.
        options: The temperature must be above 0.
    """
    # From the peak down, no temperature is small enough to overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / options.temperature
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        smallest = logits.topk(options.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probs = logits.softmax(dim=-1)
    if options.top_p < 1:
        probs = probs.masked_fill(probs < _smallest_of_nucleus(probs, options.top_p), 0)
    if options.min_p > 0:
        smallest = options.min_p * probs.amax(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < smallest, 0)
    return probs / probs.sum(dim=-1, keepdim=True)


def _smallest_of_nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Smallest of the largest probabilities that together reach top_p: (B, V) to (B, 1)."""
    vocab_size = probs.shape[-1]
    count = min(FIRST_TRY, vocab_size)
    largest = probs.topk(count).values
    while count < vocab_size and bool((largest.sum(dim=-1) < top_p).any()):
        count = min(8 * count, vocab_size)
        largest = probs.topk(count).values
    before = largest.cumsum(dim=-1) - largest
    return largest.masked_fill(before >= top_p, torch.inf).amin(dim=-1, keepdim=True)


def penalise(logits: Tensor, penalty: float, seen: Tensor | None) -> Tensor:
    """Make seen ids less likely: divide their logits, (B, V), or multiply the negative ones."""
    if seen is None or penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
