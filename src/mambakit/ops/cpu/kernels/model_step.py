"""One decoding step of a whole model on the CPU.

The threads walk through the same phases, five a layer and two of the head. The tasks of a phase are claimed one after
another, so a thread that is disturbed, or late, holds up the others by one task at most. A phase begins when every
task of the one before is done. Waiting for that takes less than a microsecond, as long as nobody sleeps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from mambakit.ops.cpu.kernels import causal_conv1d
from mambakit.ops.cpu.kernels.linear import product
from mambakit.ops.cpu.kernels.memory import count, counted, floats
from mambakit.ops.cpu.kernels.rms_norm import normalise
from mambakit.ops.cpu.kernels.simd import LOG2_E, any_order, dot, exp2, kernel, sigmoid, softplus

ZERO = np.float32(0)

NORM, IN_PROJ, X_PROJ, SCAN, OUT_PROJ = range(5)
PARTS = 5
"""Phases of a layer. After the last layer come the norm and, in the place of in_proj, the head."""
IN_ROWS, X_ROWS, SCAN_CHANNELS, OUT_ROWS, HEAD_ROWS = 64, 8, 64, 32, 128
"""Rows of a matrix, or channels, in a task: 100 KB of weights, which take 10 microseconds."""
SPINS = 100_000
"""Looks at a counter, about 0.1 ms, before a thread gives up waiting."""


class Sizes(NamedTuple):
    """Sizes of the model; all that lies behind an address has these."""

    layers: int
    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int


class Rows(NamedTuple):
    """What the phases hand on, for each row of the batch."""

    hidden: np.ndarray
    residual: np.ndarray
    normed: np.ndarray
    xz: np.ndarray
    x: np.ndarray
    steering: np.ndarray
    dt: np.ndarray
    y: np.ndarray
    logits: np.ndarray


@register_jitable
def add_norm(b, weight, eps, rows):
    """Add hidden to the residual stream, and normalise that."""
    total = rows.residual[b]
    for c in range(total.size):
        total[c] += rows.hidden[b, c]
    normalise(total, weight, eps, rows.normed[b])


@register_jitable
def in_proj(first, last, sizes, layer, rows):
    """Rows of x and z, and the convolution of those of x."""
    batch, d_inner, d_conv = rows.x.shape[0], sizes.d_inner, sizes.d_conv
    weight = floats(layer.in_proj, (2 * d_inner, sizes.d_model))
    product(first, last, rows.normed, weight, None, rows.xz)
    taps, bias = floats(layer.conv, (d_inner, d_conv)), floats(layer.conv_bias, (d_inner,))
    state = floats(layer.conv_state, (batch, d_inner, d_conv - 1))
    for b in range(batch):
        xz = rows.xz[b]
        for c in range(first, min(last, d_inner)):
            rows.x[b, c] = causal_conv1d.advance(state[b, c], xz[c : c + 1], taps[c], bias[c], True)


@any_order
def advance(state, decays, inputs, B, C, sums):
    """States of some channels, (channels, N), one step on; sums: of C h, (channels,)."""
    for c in range(inputs.size):
        h, decay, total = state[c], decays[c], ZERO
        for n in range(h.size):
            h_n = decay[n] * h[n] + inputs[c] * B[n]
            h[n] = h_n
            total += C[n] * h_n
        sums[c] = total


@register_jitable
def normalised(steering, sizes, eps):
    """Steering with a mean square of one in each of dt, B and C; steering itself if eps is None.

    Every task does it for itself: that is a small part of its product with dt_proj, and saves a phase.
    """
    if eps is None:
        return steering
    out = np.empty_like(steering)
    end_dt, end_B, end = sizes.dt_rank, sizes.dt_rank + sizes.d_state, steering.shape[1]
    for b in range(steering.shape[0]):
        for first, last in ((0, end_dt), (end_dt, end_B), (end_B, end)):
            values = steering[b, first:last]
            scale = np.float32(1) / np.sqrt(dot(values, values) / np.float32(last - first) + eps)
            for i in range(first, last):
                out[b, i] = steering[b, i] * scale
    return out


@register_jitable
def scan(first, last, sizes, layer, mixer_eps, rows):
    """Dt and the scan of some channels; loops over rows, so that they become vectors."""
    batch, d_inner, d_state, dt_rank = rows.x.shape[0], sizes.d_inner, sizes.d_state, sizes.dt_rank
    width = last - first
    steering = normalised(rows.steering, sizes, mixer_eps)
    product(first, last, steering, floats(layer.dt_proj, (d_inner, dt_rank)), None, rows.dt)
    dt_bias, D = (
        floats(layer.dt_bias, (d_inner,))[first:last],
        floats(layer.D, (d_inner,))[first:last],
    )
    states = floats(layer.ssm_state, (batch, d_inner, d_state))
    A_log = floats(layer.A_log, (d_inner, d_state))[first:last].reshape(width * d_state)
    rates, decays = np.empty(A_log.size, np.float32), np.empty(A_log.size, np.float32)
    inputs = np.empty(width, np.float32)
    for i in range(A_log.size):
        rates[i] = -LOG2_E * exp2(LOG2_E * A_log[i])
    for b in range(batch):
        x, y, dt = rows.x[b, first:last], rows.y[b, first:last], rows.dt[b, first:last]
        z = rows.xz[b, d_inner + first : d_inner + last]
        B = steering[b, dt_rank : dt_rank + d_state]
        C = steering[b, dt_rank + d_state : dt_rank + 2 * d_state]
        for c in range(width):
            dt[c] = softplus(dt[c] + dt_bias[c])
        for c in range(width):
            inputs[c] = dt[c] * x[c]
            for n in range(d_state):
                decays[c * d_state + n] = dt[c] * rates[c * d_state + n]
        for i in range(decays.size):
            decays[i] = exp2(decays[i])
        advance(states[b, first:last], decays.reshape((width, d_state)), inputs, B, C, y)
        for c in range(width):
            y[c] = (y[c] + D[c] * x[c]) * (z[c] * sigmoid(z[c]))


@register_jitable
def task_size(part, is_head):
    """Rows of a matrix, or channels, or rows of the batch, in a task."""
    if part == NORM:
        return 1
    if part == IN_PROJ:
        return HEAD_ROWS if is_head else IN_ROWS
    if part == X_PROJ:
        return X_ROWS
    return SCAN_CHANNELS if part == SCAN else OUT_ROWS


@register_jitable
def extent(part, is_head, sizes, rows):
    """What the tasks of a phase share out."""
    if part == NORM:
        return rows.x.shape[0]
    if part == IN_PROJ:
        return rows.logits.shape[1] if is_head else rows.xz.shape[1]
    if part == X_PROJ:
        return rows.steering.shape[1]
    return sizes.d_inner if part == SCAN else sizes.d_model


@kernel
def walk(phase, sizes, layers, eps, mixer_eps, norm_f, head, rows, claimed, done):
    """Take part in the phases from `phase` on; the phase in which waiting took too long, or their number at the end.

    layers: for each a record of addresses, of what `mambakit.ops.cpu.model_step.Layer` names. eps: of each norm.
    mixer_eps: of the norms of dt, B and C, or None. norm_f: (M,). head: (V, M).
    claimed, done: tasks of each phase, int64.
    """
    phases = PARTS * sizes.layers + 2
    while phase < phases:
        index, part = phase // PARTS, phase % PARTS
        is_head = index == sizes.layers
        layer = layers[min(index, sizes.layers - 1)]
        size, whole = task_size(part, is_head), extent(part, is_head, sizes, rows)
        tasks = (whole + size - 1) // size
        task = count(claimed, phase)
        while task < tasks:
            first, last = task * size, min((task + 1) * size, whole)
            if part == NORM:
                weight = norm_f if is_head else floats(layer.norm, norm_f.shape)
                add_norm(first, weight, eps[index], rows)
            elif part == IN_PROJ:
                if is_head:
                    product(first, last, rows.normed, head, None, rows.logits)
                else:
                    in_proj(first, last, sizes, layer, rows)
            elif part == X_PROJ:
                weight = floats(layer.x_proj, (whole, sizes.d_inner))
                product(first, last, rows.x, weight, None, rows.steering)
            elif part == SCAN:
                scan(first, last, sizes, layer, mixer_eps, rows)
            else:
                weight = floats(layer.out_proj, (whole, sizes.d_inner))
                product(first, last, rows.y, weight, None, rows.hidden)
            count(done, phase)
            task = count(claimed, phase)
        spins = 0
        while counted(done, phase) < tasks:
            spins += 1
            if spins == SPINS:
                return phase
        phase += 1
    return phase
