"""A few rows times a matrix; one task is one row of the matrix."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from mambakit.ops.cpu.kernels.lanes import LANES, load_bfloat16, load_floats, spread, sum_lanes
from mambakit.ops.cpu.kernels.simd import kernel, load, store

ZERO = np.float32(0)


def load_vector(weight, index):
    """Neighbouring numbers from weight[index] on as `Lanes`; uint16: bfloat16."""


@overload(load_vector, inline="always")
def _load_vector(weight, index):
    if weight.dtype == types.uint16:
        return lambda weight, index: load_bfloat16(weight, index)
    return lambda weight, index: load_floats(weight, index)


@register_jitable(forceinline=True)
def finish(lanes, x, weight, o, b, whole, bias, y):
    """Write y[b, o]: the sum of the lanes, of what is left from column `whole` on, and of the bias."""
    total = sum_lanes(lanes)
    for k in range(whole, weight.shape[1]):
        total += load(weight[o], k) * x[b, k]
    store(y[b], o, total if bias is None else total + bias[o])


@register_jitable
def product(first, last, x, weight, bias, y):
    """As `multiply`; of a row of x only as much is read as a row of the weight is long.

    Each quarter of the rows is a stream of its own: the processor reads ahead in every one of them, and so has more
    under way than in one, where it stops at the end of each page. A quarter that is short repeats the last row. Two
    rows of x share what is read, and widened, of the weight. All sums are in the same order, whatever rows are beside.
    """
    quarter, columns = (last - first + 3) // 4, weight.shape[1]
    whole = columns - columns % LANES
    pairs = x.shape[0] // 2
    for o0 in range(first, first + quarter):
        o1, o2, o3 = (
            min(o0 + quarter, last - 1),
            min(o0 + 2 * quarter, last - 1),
            min(o0 + 3 * quarter, last - 1),
        )
        for pair in range(pairs):
            b, c = 2 * pair, 2 * pair + 1
            b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = spread(ZERO)
            for k in range(0, whole, LANES):
                x_b, x_c = load_floats(x, (b, k)), load_floats(x, (c, k))
                w0, w1 = load_vector(weight, (o0, k)), load_vector(weight, (o1, k))
                w2, w3 = load_vector(weight, (o2, k)), load_vector(weight, (o3, k))
                b0, b1, b2, b3 = b0 + w0 * x_b, b1 + w1 * x_b, b2 + w2 * x_b, b3 + w3 * x_b
                c0, c1, c2, c3 = c0 + w0 * x_c, c1 + w1 * x_c, c2 + w2 * x_c, c3 + w3 * x_c
            for o, sums, others in ((o0, b0, c0), (o1, b1, c1), (o2, b2, c2), (o3, b3, c3)):
                finish(sums, x, weight, o, b, whole, bias, y)
                finish(others, x, weight, o, c, whole, bias, y)
        for b in range(2 * pairs, x.shape[0]):
            b0 = b1 = b2 = b3 = spread(ZERO)
            for k in range(0, whole, LANES):
                x_b = load_floats(x, (b, k))
                b0 += load_vector(weight, (o0, k)) * x_b
                b1 += load_vector(weight, (o1, k)) * x_b
                b2 += load_vector(weight, (o2, k)) * x_b
                b3 += load_vector(weight, (o3, k)) * x_b
            for o, sums in ((o0, b0), (o1, b1), (o2, b2), (o3, b3)):
                finish(sums, x, weight, o, b, whole, bias, y)


@kernel
def multiply(first, last, x, weight, bias, y):
    """Y = x weight^T + bias: x (B, K) float32, weight (O, K), y (B, O), float32 or bfloat16; bias (O,) or None."""
    product(first, last, x, weight, bias, y)
