"""A few rows times a matrix of codes of eight or four bits.

A row of x is rounded to 16-bit integers first, each group of it with a step of its own, so that products and their
sums within a group are exact integers: at most 16 * 32767 * 128 in each of the eight int32 sums of a group of 128.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from mambakit.ops.cpu.kernels.integer_lanes import (
    add_scaled,
    first_half,
    no_sums,
    no_totals,
    second_half,
    sum_totals,
)
from mambakit.ops.cpu.kernels.simd import ROUND, any_order, kernel, load, store

BLOCK = 64
LARGEST = np.float32(32767)


@any_order
def peak(x, first, last):
    """Largest magnitude of x[first:last]; NaN if one of them is not finite."""
    largest = spoiled = np.float32(0)
    for k in range(first, last):
        x_k = load(x, k)
        largest = max(largest, abs(x_k))
        spoiled += x_k * np.float32(0)
    return largest + spoiled


@register_jitable
def round_groups(x, first, last, codes, steps):
    """Write codes and steps of groups first to last, x ~ step * code; x ends where it ends, zeros follow."""
    group = codes.size // steps.size
    for g in range(first, last):
        start, end = g * group, min((g + 1) * group, x.size)
        largest = peak(x, start, end)
        steps[g] = largest / LARGEST
        inverse = LARGEST / largest if largest > np.float32(0) else np.float32(0)
        for k in range(start, end):
            codes[k] = np.int16((load(x, k) * inverse + ROUND) - ROUND)
        for k in range(max(start, end), (g + 1) * group):
            codes[k] = np.int16(0)


@register_jitable
def add_halves(half, sums, codes, rows, place, x, b, start):
    """Sums of four rows of the matrix, half a block on."""
    return (
        half(sums[0], codes, (rows[0], place), x, (b, start)),
        half(sums[1], codes, (rows[1], place), x, (b, start)),
        half(sums[2], codes, (rows[2], place), x, (b, start)),
        half(sums[3], codes, (rows[3], place), x, (b, start)),
    )


@register_jitable
def add_group(totals, sums, scales, rows, g, step):
    """Totals of four rows, with the sums of group g."""
    return (
        add_scaled(totals[0], sums[0], load(scales[rows[0]], g) * step),
        add_scaled(totals[1], sums[1], load(scales[rows[1]], g) * step),
        add_scaled(totals[2], sums[2], load(scales[rows[2]], g) * step),
        add_scaled(totals[3], sums[3], load(scales[rows[3]], g) * step),
    )


@register_jitable
def four_rows(codes, scales, rows, x, steps, b):
    """Products of four rows of the matrix with row b of x."""
    groups, blocks = scales.shape[1], x.shape[1] // BLOCK
    width, is_half = codes.shape[1] // blocks, groups == 2 * blocks
    per_group = max(1, blocks // groups)
    zero, none = no_sums(), no_totals()
    totals, g = (none, none, none, none), 0
    for first in range(0, blocks, per_group):
        sums = (zero, zero, zero, zero)
        for block in range(first, first + per_group):
            place, start = block * width, block * BLOCK
            sums = add_halves(first_half, sums, codes, rows, place, x, b, start)
            if is_half:
                totals = add_group(totals, sums, scales, rows, g, steps[b, g])
                sums, g = (zero, zero, zero, zero), g + 1
            sums = add_halves(second_half, sums, codes, rows, place, x, b, start)
        totals = add_group(totals, sums, scales, rows, g, steps[b, g])
        g += 1
    return totals


@register_jitable
def quantised_product(first, last, x, steps, codes, scales, bias, y):
    """As `multiply`; the rows are read in four streams, as in `linear.product`."""
    quarter = (last - first + 3) // 4
    for o0 in range(first, first + quarter):
        rows = (
            o0,
            min(o0 + quarter, last - 1),
            min(o0 + 2 * quarter, last - 1),
            min(o0 + 3 * quarter, last - 1),
        )
        for b in range(x.shape[0]):
            totals = four_rows(codes, scales, rows, x, steps, b)
            for i in range(4):
                total = sum_totals(totals[i])
                store(y[b], rows[i], total if bias is None else total + bias[rows[i]])


@kernel
def multiply(first, last, x, steps, codes, scales, bias, y):
    """Y = x weight^T + bias for rows of the weight from first to last.

    x: rounded, (B, K') int16; steps: of its groups, (B, groups) float32; codes: (O, K') int8 or (O, K' / 4) int16;
    scales: (O, groups) bfloat16; bias: (O,) float32 or None; y: (B, O) float32 or bfloat16.
    """
    quantised_product(first, last, x, steps, codes, scales, bias, y)


@kernel
def round_rows(first, last, x, codes, steps):
    """Round rows of x, (B, K) float32 or bfloat16, to codes (B, K') int16 and steps (B, groups) float32."""
    for b in range(first, last):
        round_groups(x[b], 0, steps.shape[1], codes[b], steps[b])
