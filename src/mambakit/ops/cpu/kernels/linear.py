"""A few rows times a matrix; one task is one row of the matrix."""

from __future__ import annotations

from mambakit.ops.cpu.kernels.simd import dot, kernel, store


@kernel
def multiply(first, last, x, weight, bias, y):
    """Y = x weight^T + bias: x (B, K), weight (O, K), y (B, O), float32 or bfloat16; bias (O,) or None.

    A row of the matrix meets all rows of x while it is in the cache.
    """
    for o in range(first, last):
        weight_row = weight[o]
        for b in range(x.shape[0]):
            total = dot(weight_row, x[b])
            if bias is not None:
                total += bias[o]
            store(y[b], o, total)
