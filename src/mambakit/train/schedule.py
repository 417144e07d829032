"""The learning rate of each step: linear warm-up, then a half cosine."""

from __future__ import annotations

import math


def learning_rate(step: int, *, steps: int, warmup_steps: int, peak: float, floor: float) -> float:
    r"""Give the learning rate of one optimizer step, a pure function, so resuming needs no state.

        warm-up    lr(s) = peak (s + 1) / warmup_steps                            s < warmup_steps
        cosine     lr(s) = floor + (peak - floor) (1 + cos(pi p)) / 2             p in [0, 1]

    The first step already moves the weights, the last step has exactly `floor`, and the step after
    the warm-up has `peak`.

    Args:
        step: Number of the step, from 0.
        steps: Steps of the whole run.
        warmup_steps: Steps of the warm-up; may be 0.
        peak: Largest learning rate.
        floor: Learning rate of the last step.

    Source: Gu & Dao 2023 (arXiv 2312.00752) appendix E.2.1: 10 % warm-up, cosine to 1e-5.

    Example:
        >>> [learning_rate(s, steps=5, warmup_steps=2, peak=1.0, floor=0.0) for s in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
