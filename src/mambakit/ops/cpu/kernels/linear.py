"""A few rows times a matrix; one task is one row of the matrix."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from mambakit.ops.cpu.kernels.lanes import LANES, load_bfloat16, load_floats, spread, sum_lanes
from mambakit.ops.cpu.kernels.simd import any_order, kernel, load, store


@any_order
def product(first, last, x, weight, bias, y):
    """As `multiply`; of a row of x only as much is read as a row of the weight is long.

    Each quarter of the rows is a stream of its own: the processor reads ahead in every one of them, and so has more
    under way than in one, where it stops at the end of each page. A row of the matrix meets all rows of x while it is
    in the cache. A quarter that is short repeats the last row, so that all rows are summed by the same code.
    """
    quarter = (last - first + 3) // 4
    for o0 in range(first, first + quarter):
        o1, o2, o3 = (
            min(o0 + quarter, last - 1),
            min(o0 + 2 * quarter, last - 1),
            min(o0 + 3 * quarter, last - 1),
        )
        row0, row1, row2, row3 = weight[o0], weight[o1], weight[o2], weight[o3]
        for b in range(x.shape[0]):
            x_row = x[b]
            sum0 = sum1 = sum2 = sum3 = np.float32(0)
            for k in range(row0.size):
                x_k = load(x_row, k)
                sum0 += load(row0, k) * x_k
                sum1 += load(row1, k) * x_k
                sum2 += load(row2, k) * x_k
                sum3 += load(row3, k) * x_k
            for o, total in ((o0, sum0), (o1, sum1), (o2, sum2), (o3, sum3)):
                store(y[b], o, total if bias is None else total + bias[o])


def load_vector(weight, index):
    """Neighbouring numbers from weight[index] on as `Lanes`; uint16: bfloat16."""


@overload(load_vector, inline="always")
def _load_vector(weight, index):
    if weight.dtype == types.uint16:
        return lambda weight, index: load_bfloat16(weight, index)
    return lambda weight, index: load_floats(weight, index)


@register_jitable
def vector_product(first, last, x, weight, y):
    """As `product`, for float32 x, without bias, with explicit vectors.

    Of the loop above LLVM makes one that reads bfloat16 a quarter more slowly, and short rows one by one.
    """
    quarter, columns = (last - first + 3) // 4, weight.shape[1]
    whole = columns - columns % LANES
    for o0 in range(first, first + quarter):
        o1, o2, o3 = (
            min(o0 + quarter, last - 1),
            min(o0 + 2 * quarter, last - 1),
            min(o0 + 3 * quarter, last - 1),
        )
        for b in range(x.shape[0]):
            sum0 = sum1 = sum2 = sum3 = spread(np.float32(0))
            for k in range(0, whole, LANES):
                x_k = load_floats(x, (b, k))
                sum0 += load_vector(weight, (o0, k)) * x_k
                sum1 += load_vector(weight, (o1, k)) * x_k
                sum2 += load_vector(weight, (o2, k)) * x_k
                sum3 += load_vector(weight, (o3, k)) * x_k
            for o, lanes in ((o0, sum0), (o1, sum1), (o2, sum2), (o3, sum3)):
                total = sum_lanes(lanes)
                for k in range(whole, columns):
                    total += load(weight[o], k) * x[b, k]
                store(y[b], o, total)


@kernel
def multiply(first, last, x, weight, bias, y):
    """Y = x weight^T + bias: x (B, K), weight (O, K), y (B, O), float32 or bfloat16; bias (O,) or None."""
    product(first, last, x, weight, bias, y)
