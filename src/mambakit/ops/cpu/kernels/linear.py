"""A few rows times a matrix; one task is one row of the matrix."""

from __future__ import annotations

import numpy as np

from mambakit.ops.cpu.kernels.memory import prefetch
from mambakit.ops.cpu.kernels.simd import any_order, kernel, load, store

AHEAD, PAGE_BYTES = 4, 4096
"""How many rows ahead each page is touched: the processor's own reading ahead ends where a page does."""


@any_order
def product(first, last, x, weight, bias, y):
    """As `multiply`; of a row of x only as much is read as a row of the weight is long.

    A row of the matrix meets all rows of x while it is in the cache. The sum is not left to `dot`, whose call would
    cost a sixth of the speed: a row is short.
    """
    page = PAGE_BYTES // weight.itemsize
    for o in range(first, last):
        weight_row = weight[o]
        for k in range(0, weight_row.size, page):
            prefetch(weight, o + AHEAD, k)
        for b in range(x.shape[0]):
            x_row = x[b]
            total = np.float32(0)
            for k in range(weight_row.size):
                total += load(weight_row, k) * load(x_row, k)
            if bias is not None:
                total += bias[o]
            store(y[b], o, total)


@kernel
def multiply(first, last, x, weight, bias, y):
    """Y = x weight^T + bias: x (B, K), weight (O, K), y (B, O), float32 or bfloat16; bias (O,) or None."""
    product(first, last, x, weight, bias, y)
