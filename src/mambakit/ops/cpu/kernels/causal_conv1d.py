"""The causal depthwise convolution on the CPU, forward and backward.

One task is one batch row and `GROUP` channels; it walks the time step by step, a step is a vector operation per tap.
weight: (W, D). past: (B, W-1, D), the inputs before time 0. age: (B, L), the steps since the document began (large in
the document of time 0), or None: a tap that reaches further back than that meets zero.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from mambakit.ops.cpu.kernels.rows import row
from mambakit.ops.cpu.kernels.simd import flush, kernel, load, sigmoid, store

GROUP = 256
FLUSH = 32
ONE = np.float32(1)


@register_jitable
def convolve(x, weight, bias, past, age, b, t, channel, width, sums):
    """Sums = bias + the taps at time t, before the activation."""
    taps = weight.shape[0]
    for c in range(width):
        sums[c] = np.float32(0)
    if bias is not None:
        bias_row = bias[channel : channel + width]
        for c in range(width):
            sums[c] = bias_row[c]
    for tap in range(taps):
        distance = taps - 1 - tap
        if age is not None and distance > age[b, t]:
            continue
        w = weight[tap, channel : channel + width]
        if distance <= t:
            x_row = row(x, b, t - distance, channel, width)
            for c in range(width):
                sums[c] += w[c] * load(x_row, c)
        else:
            past_row = past[b, taps - 1 + t - distance, channel : channel + width]
            for c in range(width):
                sums[c] += w[c] * past_row[c]


@kernel
def forward(first, last, seqlen, d_inner, x, weight, bias, past, age, silu, y):
    """Write y; x and y are Rows."""
    groups = (d_inner + GROUP - 1) // GROUP
    sums = np.empty(GROUP, np.float32)
    for task in range(first, last):
        b, channel = task // groups, task % groups * GROUP
        width = min(GROUP, d_inner - channel)
        for t in range(seqlen):
            convolve(x, weight, bias, past, age, b, t, channel, width, sums)
            y_row = row(y, b, t, channel, width)
            if silu:
                for c in range(width):
                    store(y_row, c, sums[c] * sigmoid(sums[c]))
            else:
                for c in range(width):
                    store(y_row, c, sums[c])


@kernel
def backward(
    first, last, seqlen, d_inner, x, weight, bias, past, age, silu, dy, dx, dweight, dbias, dpast
):
    """Write dx (Rows); add to dweight (B, W, D), dbias (B, D) and dpast (B, W-1, D), which come in as zeros.

    Time runs backwards. A ring of W rows collects what later steps owe to the input of each step; a row is complete,
    and written, once its own step is done. Sums over time: float32 for `FLUSH` steps, their sums in float64.
    """
    groups = (d_inner + GROUP - 1) // GROUP
    taps = weight.shape[0]
    sums = np.empty(GROUP, np.float32)
    ring = np.zeros((taps, GROUP), np.float32)
    dw_sums = np.zeros((taps, GROUP), np.float32)
    dbias_sums = np.zeros(GROUP, np.float32)
    for task in range(first, last):
        b, channel = task // groups, task % groups * GROUP
        width = min(GROUP, d_inner - channel)
        for t in range(seqlen - 1, -1, -1):
            dy_row = row(dy, b, t, channel, width)
            if silu:
                convolve(x, weight, bias, past, age, b, t, channel, width, sums)
                for c in range(width):
                    s = sigmoid(sums[c])
                    sums[c] = load(dy_row, c) * (s * (ONE + sums[c] * (ONE - s)))
            else:
                for c in range(width):
                    sums[c] = load(dy_row, c)
            for c in range(width):
                dbias_sums[c] += sums[c]
            for tap in range(taps):
                distance = taps - 1 - tap
                if age is not None and distance > age[b, t]:
                    continue
                w = weight[tap, channel : channel + width]
                dw = dw_sums[tap]
                if distance <= t:
                    x_row = row(x, b, t - distance, channel, width)
                    owed = ring[(t - distance) % taps]
                    for c in range(width):
                        dw[c] += sums[c] * load(x_row, c)
                        owed[c] += sums[c] * w[c]
                else:
                    past_row = past[b, taps - 1 + t - distance, channel : channel + width]
                    owed = dpast[b, taps - 1 + t - distance, channel : channel + width]
                    for c in range(width):
                        dw[c] += sums[c] * past_row[c]
                        owed[c] += sums[c] * w[c]
            dx_row, complete = row(dx, b, t, channel, width), ring[t % taps]
            for c in range(width):
                store(dx_row, c, complete[c])
                complete[c] = np.float32(0)
            if t % FLUSH == 0:
                flush(dbias_sums, dbias[b, channel : channel + width])
                for tap in range(taps):
                    flush(dw_sums[tap], dweight[b, tap, channel : channel + width])


@register_jitable
def advance(state, value, weight, bias, silu):
    """One step of one channel: y; the state (W-1,) moves on to the value. weight: (W,)."""
    taps = weight.size
    total = weight[taps - 1] * load(value, 0)
    for tap in range(taps - 1):
        total += weight[tap] * load(state, tap)
    total += bias
    for tap in range(taps - 2):
        state[tap] = state[tap + 1]
    if taps > 1:
        state[taps - 2] = value[0]
    return total * sigmoid(total) if silu else total


@kernel
def step(state, x, weight, bias, silu, y):
    """Write y and move the state (B, D, W-1) on by one step; x and y are (B, D), weight is (D, W)."""
    for b in range(x.shape[0]):
        x_row, y_row = x[b], y[b]
        for c in range(weight.shape[0]):
            bias_c = np.float32(0) if bias is None else bias[c]
            store(y_row, c, advance(state[b, c], x_row[c : c + 1], weight[c], bias_c, silu))
