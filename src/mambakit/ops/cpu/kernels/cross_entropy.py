"""Softmax cross-entropy of rows of logits on the CPU; one task is one row."""

from __future__ import annotations

import numpy as np
from numba import njit

from mambakit.ops.cpu.kernels.simd import dot, exp, kernel, load, store

# Sums and maxima vectorise only if the compiler may choose their order. (The `exp` must not be in such a function:
# reordered, its rounding trick cancels.) A NaN that the maximum overlooks shows in the sum.
_any_order = njit(nogil=True, fastmath={"reassoc", "nsz", "nnan"}, error_model="numpy", cache=True)


@_any_order
def largest(row):
    """max over the row."""
    found = load(row, 0)
    for i in range(row.size):
        value = load(row, i)
        found = value if value > found else found
    return found


@kernel
def softmax_loss(first, last, logits, targets, weights, losses, gradients):
    """losses = logsumexp(logits) - logits[target], 0 where the weight is 0.

    With `gradients`, logits become weight (softmax(logits) - one-hot(target)). logits: (rows, V); the rest (rows,).
    """
    ones = np.ones(logits.shape[1], np.float32)
    powers = np.empty(logits.shape[1], np.float32)
    for r in range(first, last):
        row, target, weight = logits[r], targets[r], weights[r]
        if weight == np.float32(0):
            losses[r] = np.float32(0)
            if gradients:
                row[:] = 0
            continue
        shift = largest(row)
        for i in range(row.size):
            powers[i] = exp(load(row, i) - shift)
        total = dot(powers, ones)
        losses[r] = np.log(total) + shift - load(row, target)
        if gradients:
            scale = weight / total
            for i in range(row.size):
                store(row, i, powers[i] * scale)
            store(row, target, powers[target] * scale - weight)
