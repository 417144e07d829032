"""A few rows times a matrix of codes of eight or four bits.

A row of x is rounded to 16-bit integers first, each group of it with a step of its own, so that products and their
sums within a group are exact integers: at most 16 * 32767 * 128 in each of the eight int32 sums of a group of 128.
"""

from __future__ import annotations

import numpy as np
from numba import int8
from numba.extending import overload, register_jitable

from mambakit.ops.cpu.kernels.integer_lanes import (
    add_block,
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


@register_jitable(forceinline=True)
def block_groups(codes, scales, o0, o1, o2, o3, x, steps, b):
    """Totals of four rows of the matrix with row b of x, for groups of whole blocks.

    Written out four times: with tuples and loops over them LLVM makes code that takes twice as long.
    """
    blocks = x.shape[1] // BLOCK
    width, shift = codes.shape[1] // blocks, 0 if scales.shape[1] == blocks else 1
    scales0, scales1, scales2, scales3 = scales[o0], scales[o1], scales[o2], scales[o3]
    total0 = total1 = total2 = total3 = no_totals()
    for block in range(blocks):
        c, k, g = block * width, block * BLOCK, block >> shift
        sum0 = sum1 = sum2 = sum3 = no_sums()
        sum0 = add_block(sum0, codes, (o0, c), x, (b, k))
        sum1 = add_block(sum1, codes, (o1, c), x, (b, k))
        sum2 = add_block(sum2, codes, (o2, c), x, (b, k))
        sum3 = add_block(sum3, codes, (o3, c), x, (b, k))
        step = steps[b, g]
        total0 = add_scaled(total0, sum0, load(scales0, g) * step)
        total1 = add_scaled(total1, sum1, load(scales1, g) * step)
        total2 = add_scaled(total2, sum2, load(scales2, g) * step)
        total3 = add_scaled(total3, sum3, load(scales3, g) * step)
    return total0, total1, total2, total3


@register_jitable(forceinline=True)
def half_groups(codes, scales, o0, o1, o2, o3, x, steps, b):
    """As `block_groups`, for groups of half a block."""
    blocks = x.shape[1] // BLOCK
    width, zero = codes.shape[1] // blocks, no_sums()
    scales0, scales1, scales2, scales3 = scales[o0], scales[o1], scales[o2], scales[o3]
    total0 = total1 = total2 = total3 = no_totals()
    for block in range(blocks):
        c, k, g = block * width, block * BLOCK, 2 * block
        first, second = steps[b, g], steps[b, g + 1]
        sum0 = first_half(zero, codes, (o0, c), x, (b, k))
        sum1 = first_half(zero, codes, (o1, c), x, (b, k))
        sum2 = first_half(zero, codes, (o2, c), x, (b, k))
        sum3 = first_half(zero, codes, (o3, c), x, (b, k))
        total0 = add_scaled(total0, sum0, load(scales0, g) * first)
        total1 = add_scaled(total1, sum1, load(scales1, g) * first)
        total2 = add_scaled(total2, sum2, load(scales2, g) * first)
        total3 = add_scaled(total3, sum3, load(scales3, g) * first)
        sum0 = second_half(zero, codes, (o0, c), x, (b, k))
        sum1 = second_half(zero, codes, (o1, c), x, (b, k))
        sum2 = second_half(zero, codes, (o2, c), x, (b, k))
        sum3 = second_half(zero, codes, (o3, c), x, (b, k))
        total0 = add_scaled(total0, sum0, load(scales0, g + 1) * second)
        total1 = add_scaled(total1, sum1, load(scales1, g + 1) * second)
        total2 = add_scaled(total2, sum2, load(scales2, g + 1) * second)
        total3 = add_scaled(total3, sum3, load(scales3, g + 1) * second)
    return total0, total1, total2, total3


@register_jitable(forceinline=True)
def finish(y_row, o, totals, bias):
    """Write one product."""
    total = sum_totals(totals)
    store(y_row, o, total if bias is None else total + bias[o])


@register_jitable
def quantised_product(first, last, x, steps, codes, scales, bias, y):
    """As `multiply`; the rows are read in four streams, as in `linear.product`."""
    quarter = (last - first + 3) // 4
    is_half = scales.shape[1] * BLOCK > x.shape[1]
    for o0 in range(first, first + quarter):
        o1, o2, o3 = (
            min(o0 + quarter, last - 1),
            min(o0 + 2 * quarter, last - 1),
            min(o0 + 3 * quarter, last - 1),
        )
        for b in range(x.shape[0]):
            totals = (
                half_groups(codes, scales, o0, o1, o2, o3, x, steps, b)
                if is_half
                else block_groups(codes, scales, o0, o1, o2, o3, x, steps, b)
            )
            finish(y[b], o0, totals[0], bias)
            finish(y[b], o1, totals[1], bias)
            finish(y[b], o2, totals[2], bias)
            finish(y[b], o3, totals[3], bias)


def code_at(codes, start, i):
    """Code start + i of a row as float32; 16 divides start, and i is less."""


@overload(code_at)
def _code_at(codes, start, i):
    if codes.dtype == int8:
        return lambda codes, start, i: np.float32(codes[start + i])

    def nibble(codes, start, i):
        word = np.int32(codes[start // BLOCK * 16 + i])
        return np.float32(((word >> (start // 4 % 16)) & 15 ^ 8) - 8)

    return nibble


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


@kernel
def dequantise(first, last, codes, scales, weight):
    """Write rows of the matrix, weight (O, K) float32, from codes and scales as in `multiply`."""
    columns, groups = weight.shape[1], scales.shape[1]
    group = (codes.shape[1] if codes.itemsize == 1 else 4 * codes.shape[1]) // groups
    for o in range(first, last):
        row, code_row = weight[o], codes[o]
        for g in range(groups):
            scale = load(scales[o], g)
            for start in range(g * group, min((g + 1) * group, columns), 16):
                for k in range(start, min(start + 16, columns)):
                    row[k] = scale * code_at(code_row, start, k - start)
