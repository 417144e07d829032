"""Root-mean-square normalisation on the CPU, forward and backward; one task is `ROWS` rows of M values."""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from mambakit.ops.cpu.kernels.simd import dot, kernel, load, store

ROWS = 16


@register_jitable
def read(x, residual, r, values):
    """values = row r of x, plus that of the residual if there is one."""
    x_row = x[r]
    for c in range(x.shape[1]):
        values[c] = load(x_row, c)
    if residual is not None:
        residual_row = residual[r]
        for c in range(x.shape[1]):
            values[c] += load(residual_row, c)


@register_jitable
def normalise(values, weight, eps, y_row):
    """Write values / rms(values) * weight."""
    scale = np.float32(1) / np.sqrt(dot(values, values) / np.float32(values.size) + eps)
    for c in range(values.size):
        store(y_row, c, values[c] * scale * load(weight, c))


@kernel
def forward(first, last, x, residual, weight, eps, y, total):
    """total = x + residual (not written if that is None), and y = total normalised; x, y: (rows, M)."""
    width = x.shape[1]
    values = np.empty(width, np.float32)
    for r in range(first * ROWS, min(last * ROWS, x.shape[0])):
        read(x, residual, r, values)
        if residual is not None:
            total_row = total[r]
            for c in range(width):
                store(total_row, c, values[c])
        normalise(values, weight, eps, y[r])


@kernel
def backward(first, last, x, residual, weight, eps, dy, dtotal, dx, dweight):
    """dx = dtotal + the gradient through the norm of x + residual; dweight: (tasks, M), still to be summed.

    With s = 1 / rms and n = s total:  d total = s (weight dy - n mean(weight dy n)).
    """
    width = x.shape[1]
    values, scaled = np.empty(width, np.float32), np.empty(width, np.float32)
    for task in range(first, last):
        dweight_row = dweight[task]
        for r in range(task * ROWS, min((task + 1) * ROWS, x.shape[0])):
            dy_row, dx_row = dy[r], dx[r]
            read(x, residual, r, values)
            scale = np.float32(1) / np.sqrt(dot(values, values) / np.float32(width) + eps)
            for c in range(width):
                values[c] *= scale
                scaled[c] = load(dy_row, c) * weight[c]
            mean = dot(values, scaled) / np.float32(width)
            for c in range(width):
                dweight_row[c] += load(dy_row, c) * values[c]
                scaled[c] = scale * (scaled[c] - values[c] * mean)
            if dtotal is not None:
                dtotal_row = dtotal[r]
                for c in range(width):
                    scaled[c] += load(dtotal_row, c)
            for c in range(width):
                store(dx_row, c, scaled[c])
