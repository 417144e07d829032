"""One decoding step of a whole model on the CPU.

The threads walk through the same phases, five a layer and two of the head. The tasks of a phase are claimed one after
another, and each is smaller than the one before: a task costs a microsecond besides its work, so there should be few,
and threads, one of which may be disturbed, or late, should end together. A phase begins when all of the one before is
done. Waiting for that takes less than a microsecond, as long as nobody sleeps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from mambakit.ops.cpu.kernels.lanes import (
    LANES,
    load_floats,
    spread,
    store_floats,
    sum_lanes,
)
from mambakit.ops.cpu.kernels.memory import array_at, count, counted, floats
from mambakit.ops.cpu.kernels.operand import Operand, matrix_at, multiply, prepare
from mambakit.ops.cpu.kernels.rms_norm import normalise
from mambakit.ops.cpu.kernels.simd import (
    LOG2_E,
    dot,
    exp2,
    kernel,
    load,
    sigmoid,
    softplus,
    store,
)

ZERO = np.float32(0)

NORM, IN_PROJ, X_PROJ, SCAN, OUT_PROJ = range(5)
PARTS = 5
"""Phases of a layer. After the last layer come the norm and, in the place of in_proj, the head."""
SPINS = 100_000
"""Looks at a counter, about 0.1 ms, before a thread gives up waiting."""


class Sizes(NamedTuple):
    """Sizes of the model; all that lies behind an address has these. And of units, of which tasks are made."""

    layers: int
    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    rows: int
    channels: int


class Rows(NamedTuple):
    """What the phases hand on, for each row of the batch; `Operand`s are multiplied with a matrix."""

    hidden: np.ndarray
    residual: np.ndarray
    normed: Operand
    xz: np.ndarray
    x: Operand
    steering: Operand
    dt: np.ndarray
    y: Operand
    logits: np.ndarray


@register_jitable
def add_norm(b, weight, eps, rows, head):
    """Add hidden to the residual stream, and normalise that."""
    total, normed = rows.residual[b], rows.normed
    for c in range(total.size):
        total[c] += rows.hidden[b, c]
    normalise(total, weight, eps, normed.values[b])
    prepare(normed, b, 0, total.size, total.size, head)


@register_jitable
def convolve(b, first, last, inputs, taps, bias, state, x):
    """x = silu(convolution) of some channels; their state, (B, D, W-1), moves on."""
    newest = taps.shape[1] - 1
    for c in range(first, last):
        total = load(bias, c) + load(taps[c], newest) * inputs[c]
        for tap in range(newest):
            total += load(taps[c], tap) * load(state[b, c], tap)
        for tap in range(newest - 1):
            state[b, c, tap] = state[b, c, tap + 1]
        if newest > 0:
            store(state[b, c], newest - 1, inputs[c])
        x[c] = total
    for c in range(first, last):
        x[c] *= sigmoid(x[c])


@register_jitable
def in_proj(first, last, sizes, layer, rows, norm_f, head):
    """Rows of x and z, and the convolution of those of x."""
    batch, d_inner, d_conv = rows.xz.shape[0], sizes.d_inner, sizes.d_conv
    weight, scales = matrix_at(
        layer.in_proj, layer.in_scales, 2 * d_inner, sizes.d_model, rows.normed, head
    )
    multiply(first, last, rows.normed, weight, scales, rows.xz)
    taps = array_at(layer.conv, (d_inner, d_conv), norm_f)
    bias = array_at(layer.conv_bias, (d_inner,), norm_f)
    state = array_at(layer.conv_state, (batch, d_inner, d_conv - 1), norm_f)
    last = min(last, d_inner)
    for b in range(batch):
        convolve(b, first, last, rows.xz[b], taps, bias, state, rows.x.values[b])
        prepare(rows.x, b, first, last, d_inner, head)


@register_jitable
def advance(states, A_log, dt, inputs, B, C, sums):
    """States of some channels, (channels, N), one step on; sums: of C h, (channels,).

    With explicit vectors: loops over sixteen states are too short for those that LLVM makes of them.
    """
    d_state = states.shape[1]
    whole = d_state - d_state % LANES
    for c in range(dt.size):
        rate, total = -LOG2_E * dt[c], spread(ZERO)
        for n in range(0, whole, LANES):
            decay = exp2(rate * exp2(LOG2_E * load_floats(A_log, (c, n))))
            h = decay * load_floats(states, (c, n)) + inputs[c] * load_floats(B, (n,))
            store_floats(states, (c, n), h)
            total += h * load_floats(C, (n,))
        sums[c] = sum_lanes(total)
        for n in range(whole, d_state):
            decay = exp2(rate * exp2(LOG2_E * A_log[c, n]))
            states[c, n] = decay * states[c, n] + inputs[c] * B[n]
            sums[c] += C[n] * states[c, n]


@register_jitable
def normalised(values, sizes, eps):
    """Dt, B and C, each with a mean square of one; the values themselves if eps is None.

    Every task does it for itself: that is a small part of its product with dt_proj, and saves a phase.
    """
    if eps is None:
        return values
    out = np.empty_like(values)
    end_dt, end_B, end = sizes.dt_rank, sizes.dt_rank + sizes.d_state, values.shape[1]
    for b in range(values.shape[0]):
        for first, last in ((0, end_dt), (end_dt, end_B), (end_B, end)):
            part = values[b, first:last]
            scale = np.float32(1) / np.sqrt(dot(part, part) / np.float32(last - first) + eps)
            for i in range(first, last):
                out[b, i] = values[b, i] * scale
    return out


@register_jitable
def scan(first, last, sizes, layer, mixer_eps, rows, head, steering):
    """Dt and the scan of some channels."""
    batch, d_inner, d_state, dt_rank = rows.xz.shape[0], sizes.d_inner, sizes.d_state, sizes.dt_rank
    width = last - first
    codes, steps = np.zeros_like(rows.steering.codes), np.zeros_like(rows.steering.steps)
    low = Operand(normalised(rows.steering.values, sizes, mixer_eps), codes, steps)
    for b in range(batch):
        prepare(low, b, 0, dt_rank, dt_rank, steering)
    dt_proj, scales = matrix_at(layer.dt_proj, layer.dt_scales, d_inner, dt_rank, low, steering)
    multiply(first, last, low, dt_proj, scales, rows.dt)
    dt_bias, D = (
        floats(layer.dt_bias, (d_inner,))[first:last],
        floats(layer.D, (d_inner,))[first:last],
    )
    states = floats(layer.ssm_state, (batch, d_inner, d_state))
    A_log = floats(layer.A_log, (d_inner, d_state))[first:last]
    inputs = np.empty(width, np.float32)
    for b in range(batch):
        x, y = rows.x.values[b, first:last], rows.y.values[b, first:last]
        dt, steer = rows.dt[b, first:last], low.values[b]
        z = rows.xz[b, d_inner + first : d_inner + last]
        B = steer[dt_rank : dt_rank + d_state]
        C = steer[dt_rank + d_state : dt_rank + 2 * d_state]
        for c in range(width):
            dt[c] = softplus(dt[c] + dt_bias[c])
            inputs[c] = dt[c] * x[c]
        advance(states[b, first:last], A_log, dt, inputs, B, C, y)
        for c in range(width):
            y[c] = (y[c] + D[c] * x[c]) * (z[c] * sigmoid(z[c]))
        prepare(rows.y, b, first, last, d_inner, head)


@register_jitable
def unit_size(part, sizes):
    """Rows of a matrix, or channels, or rows of the batch, in a unit."""
    if part == NORM:
        return 1
    return sizes.channels if part in (IN_PROJ, SCAN) else sizes.rows


@register_jitable
def extent(part, is_head, sizes, rows):
    """What the tasks of a phase share out."""
    if part == NORM:
        return rows.xz.shape[0]
    if part == IN_PROJ:
        return rows.logits.shape[1] if is_head else rows.xz.shape[1]
    if part == X_PROJ:
        return rows.steering.values.shape[1]
    return sizes.d_inner if part == SCAN else sizes.d_model


@register_jitable
def run_task(
    part, first, last, index, sizes, layer, eps, mixer_eps, norm_f, steering, scales, head, rows
):
    """One task of a phase; index: of the layer, which for the head is their number."""
    is_head = index == sizes.layers
    if part == NORM:
        weight = norm_f if is_head else array_at(layer.norm, norm_f.shape, norm_f)
        for b in range(first, last):
            add_norm(b, weight, eps[index], rows, head)
    elif part == IN_PROJ:
        if is_head:
            multiply(first, last, rows.normed, head, scales, rows.logits)
        else:
            in_proj(first, last, sizes, layer, rows, norm_f, head)
    elif part == X_PROJ:
        whole, d_inner = rows.steering.values.shape[1], sizes.d_inner
        weight, scales = matrix_at(layer.x_proj, layer.x_scales, whole, d_inner, rows.x, steering)
        multiply(first, last, rows.x, weight, scales, rows.steering.values)
    elif part == SCAN:
        scan(first, last, sizes, layer, mixer_eps, rows, head, steering)
    else:
        weight, scales = matrix_at(
            layer.out_proj, layer.out_scales, sizes.d_model, sizes.d_inner, rows.y, head
        )
        multiply(first, last, rows.y, weight, scales, rows.hidden)


@register_jitable
def task_units(task, units, threads):
    """First and last unit of a task, which takes half a thread's part of what the tasks before it leave."""
    first = last = 0
    for _ in range(task + 1):
        first = last
        last += (units - first + 2 * threads - 1) // (2 * threads)
    return first, last


@kernel
def walk(
    phase, end, threads, sizes, layers, eps, mixer_eps, norm_f, steering, scales, head, rows, claimed, done,
):  # fmt: skip
    """Take part in the phases from `phase` on; the phase in which waiting took too long, or `end`.

    layers: for each a record of addresses, of what `mambakit.ops.model_layer.Layer` names. eps: of each norm.
    mixer_eps: of the norms of dt, B and C, or None. norm_f: (M,), in the dtype of norms and convolutions.
    steering: an array of the dtype of x_proj and dt_proj. head: (V, M) in the dtype of the other matrices, or its
    codes, and their scales. claimed, done: tasks and units of each phase, int64.
    """
    while phase < end:
        index, part = phase // PARTS, phase % PARTS
        layer = layers[min(index, sizes.layers - 1)]
        size, whole = unit_size(part, sizes), extent(part, index == sizes.layers, sizes, rows)
        units = (whole + size - 1) // size
        first, last = task_units(count(claimed, phase, 1), units, threads)
        while first < last:
            run_task(
                part, first * size, min(last * size, whole), index, sizes, layer, eps, mixer_eps, norm_f,
                steering, scales, head, rows,
            )  # fmt: skip
            count(done, phase, last - first)
            first, last = task_units(count(claimed, phase, 1), units, threads)
        spins = 0
        while counted(done, phase) < units:
            spins += 1
            if spins == SPINS:
                return phase
        phase += 1
    return phase
