"""The selective scan on the CPU, forward and backward.

One task is one batch row and one group of channels; it walks the time in tiles of `TILE` steps. In a tile

1. whole rows of the inputs are read and turned into dt (after bias and softplus) and u = dt x,
2. the recurrence runs over one block of `LANES` channels after the other: its states stay in the first-level cache,
   a time step is one vector operation per state and term, and nothing is ever summed across lanes,
3. whole rows of the results are written.

Parameters come in blocks, (groups, blocks, N, LANES) with zeros where there is no channel. B and C are (B, L, N), or
in blocks if constant in time. An absent z, restart or saved is None: Numba compiles one kernel for each combination in
use and drops the dead branches.

The same source serves real and complex A: y = Re sum_n C h + D x. Complex blocks are (groups, blocks, N, 2, LANES), and
`read` makes ComplexLanes of them; complex B and C that vary in time are complex64. Below, (*N, LANES) stands for both.

The backward keeps nothing of the forward but the state before each tile. It walks the tiles from the last to the
first, replays the states and decays of a tile, and then runs the adjoint recurrence through it (the formulas:
docs/maths/selective-scan.md). dB and dC are sums over channels: they are kept a lane each over the blocks of a group,
added across lanes once a tile, and written one row a group, for the caller to add in a fixed order.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from mambakit.ops.cpu.kernels.complex_lanes import complex_lanes, read, write
from mambakit.ops.cpu.kernels.decay import decay
from mambakit.ops.cpu.kernels.lanes import LANES, load_lanes, spread, store_lanes, sum_lanes
from mambakit.ops.cpu.kernels.rows import row
from mambakit.ops.cpu.kernels.simd import flush, kernel, load, sigmoid, softplus, store

TILE = 16
PART = 16
"""Sums over the states are sums of sums of so many: their error stays small for large N."""
ZERO, ONE = np.float32(0), np.float32(1)


def weight(W, b, t, g, j, n):
    """B or C for block j of group g: the same in all lanes at batch row b and time t, or constant in time."""


@overload(weight, inline="always")
def _weight(W, b, t, g, j, n):
    if W.ndim > 3:
        return lambda W, b, t, g, j, n: read(W, (g, j, n))
    if W.dtype == types.complex64:
        return lambda W, b, t, g, j, n: complex_lanes(
            spread(W[b, t, n].real), spread(W[b, t, n].imag)
        )
    return lambda W, b, t, g, j, n: W[b, t, n]


@register_jitable
def read_inputs(x, dt, dt_bias, dt_softplus, b, start, steps, channel, width, dts, u):
    """Dts = dt after bias and softplus, u = dts x, for one tile; both (TILE, channels of a group)."""
    for t in range(steps):
        dt_row, x_row = row(dt, b, start + t, channel, width), row(x, b, start + t, channel, width)
        bias = dt_bias[channel : channel + width]
        for c in range(width):
            dts[t, c] = load(dt_row, c) + bias[c]
        if dt_softplus:
            for c in range(width):
                dts[t, c] = softplus(dts[t, c])
        for c in range(width):
            u[t, c] = dts[t, c] * load(x_row, c)


@kernel
def forward(
    first, last, seqlen, d_inner, x, dt, A, B, C, D, z, dt_bias, dt_softplus, restart, state, y, saved,
):  # fmt: skip
    """Write y and, if `saved` is given, the state before each tile; advance `state` from initial to final.

    x, dt, z, y: Rows. state: (B, groups, blocks, *N, LANES). restart: (B, L) bool. saved: (B, tiles, *state[0].shape).
    """
    groups, blocks, d_state = A.shape[:3]
    group_width = blocks * LANES
    dts = np.zeros((TILE, blocks, LANES), np.float32)
    u = np.zeros((TILE, blocks, LANES), np.float32)
    sums = np.empty((TILE, blocks, LANES), np.float32)
    dts_rows, u_rows = dts.reshape(TILE, group_width), u.reshape(TILE, group_width)
    sums_rows = sums.reshape(TILE, group_width)

    for task in range(first, last):
        b, g = task // groups, task % groups
        channel = g * group_width
        width = min(group_width, d_inner - channel)
        used = (width + LANES - 1) // LANES
        h = state[b, g]
        dts_rows[:, width:] = ZERO
        u_rows[:, width:] = ZERO
        for tile in range((seqlen + TILE - 1) // TILE):
            start = tile * TILE
            steps = min(TILE, seqlen - start)
            if saved is not None:
                saved[b, tile, g] = h
            read_inputs(
                x, dt, dt_bias, dt_softplus, b, start, steps, channel, width, dts_rows, u_rows
            )
            for j in range(used):
                for t in range(steps):
                    if restart is not None and restart[b, start + t]:
                        h[j] = ZERO
                    dt_t, u_t = load_lanes(dts, (t, j)), load_lanes(u, (t, j))
                    total = spread(ZERO)
                    for n_0 in range(0, d_state, PART):
                        part = spread(ZERO)
                        for n in range(n_0, min(n_0 + PART, d_state)):
                            old = decay(dt_t, read(A, (g, j, n))) * read(h, (j, n))
                            h_n = old + u_t * weight(B, b, start + t, g, j, n)
                            write(h, (j, n), h_n)
                            part += (h_n * weight(C, b, start + t, g, j, n)).real
                        total += part
                    store_lanes(sums, (t, j), total)
            for t in range(steps):
                y_row, x_row = (
                    row(y, b, start + t, channel, width),
                    row(x, b, start + t, channel, width),
                )
                D_row = D[channel : channel + width]
                for c in range(width):
                    sums_rows[t, c] += D_row[c] * load(x_row, c)
                if z is not None:
                    z_row = row(z, b, start + t, channel, width)
                    for c in range(width):
                        z_c = load(z_row, c)
                        sums_rows[t, c] *= z_c * sigmoid(z_c)
                for c in range(width):
                    store(y_row, c, sums_rows[t, c])


def add(dW, W, amount, t, g, j, n):
    """Add to the gradient of W = B or C: of step t in this tile, or of the constant in block j of group g."""


@overload(add, inline="always")
def _add(dW, W, amount, t, g, j, n):
    if W.ndim == 3:
        return lambda dW, W, amount, t, g, j, n: write(dW, (t, n), read(dW, (t, n)) + amount)
    return lambda dW, W, amount, t, g, j, n: write(dW, (g, j, n), read(dW, (g, j, n)) + amount)


@register_jitable
def replay(dts, u, A, B, C, restart, b, start, steps, g, j, h, decays, sums):
    """Recompute a tile of one block: h[t + 1] and the decays of step t, from h[0]; and sums = Re sum_n C h."""
    for t in range(steps):
        alive = ZERO if restart is not None and restart[b, start + t] else ONE
        dt_t, u_t = load_lanes(dts, (t, j)), load_lanes(u, (t, j))
        total = spread(ZERO)
        for n_0 in range(0, A.shape[2], PART):
            part = spread(ZERO)
            for n in range(n_0, min(n_0 + PART, A.shape[2])):
                decay_n = decay(dt_t, read(A, (g, j, n)))
                if restart is not None:
                    decay_n = decay_n * alive
                h_n = decay_n * read(h, (t, n)) + u_t * weight(B, b, start + t, g, j, n)
                write(decays, (t, n), decay_n)
                write(h, (t + 1, n), h_n)
                part += (h_n * weight(C, b, start + t, g, j, n)).real
            total += part
        store_lanes(sums, (t, j), total)


@register_jitable
def adjoint(dts, u, A, B, C, b, start, steps, g, j, h, decays, dsums, dh, dA, dB, dC, du, ddts):
    """Run the adjoint recurrence of one block backwards through a tile.

    dh is the adjoint of the state after the tile times the decay into it; it becomes that of the state before.
    """
    for t in range(steps - 1, -1, -1):
        dt_t, u_t, dsum = load_lanes(dts, (t, j)), load_lanes(u, (t, j)), load_lanes(dsums, (t, j))
        du_t, ddt_t = spread(ZERO), spread(ZERO)
        for n_0 in range(0, A.shape[2], PART):
            du_part, ddt_part = spread(ZERO), spread(ZERO)
            for n in range(n_0, min(n_0 + PART, A.shape[2])):
                B_n = weight(B, b, start + t, g, j, n).conjugate()
                C_n = weight(C, b, start + t, g, j, n).conjugate()
                dh_n = read(dh, (j, n)) + dsum * C_n
                add(dC, C, dsum * read(h, (t + 1, n)).conjugate(), t, g, j, n)
                add(dB, B, dh_n * u_t, t, g, j, n)
                du_part += (dh_n * B_n).real
                dh_before = dh_n * read(decays, (t, n)).conjugate()
                write(dh, (j, n), dh_before)
                q = dh_before * read(h, (t, n)).conjugate()
                ddt_part += (q * read(A, (g, j, n)).conjugate()).real
                write(dA, (j, n), read(dA, (j, n)) + q * dt_t)
            du_t += du_part
            ddt_t += ddt_part
        store_lanes(du, (t, j), du_t)
        store_lanes(ddts, (t, j), ddt_t)


@register_jitable
def add_lanes(lanes, steps, sums):
    """Write the sums over the lanes of `steps` steps, in the order in which they lie; leave zeros."""
    flat = lanes.reshape(TILE, lanes.size // (TILE * LANES), LANES)
    for t in range(steps):
        for n in range(flat.shape[1]):
            sums[t, n] = sum_lanes(load_lanes(flat, (t, n)))
            store_lanes(flat, (t, n), spread(ZERO))


@kernel
def backward(
    first, last, seqlen, d_inner, x, dt, A, B, C, D, z, dt_bias, dt_softplus, restart, saved,
    dy, dh, dx, ddt, dA, dB, dC, dD, dz, ddt_bias,
):  # fmt: skip
    """Write all gradients; dh comes in as the gradient of the final state and goes out as that of the initial.

    x, dt, z, dy, dx, ddt, dz: Rows. dh and dA (still to be summed over the batch): (B, groups, blocks, *N, LANES).
    dB, dC: (groups, B, L, N or 2N), to be summed over the groups, or like dA if constant. dD, ddt_bias: (B, D) float64.
    """
    groups, blocks = A.shape[:2]
    group_width = blocks * LANES
    shape = (TILE, blocks, LANES)
    dts, u, sums = (
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
    )
    dsums, du, ddts = (
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
    )
    flat = (TILE, group_width)
    dts_rows, u_rows, sums_rows = dts.reshape(flat), u.reshape(flat), sums.reshape(flat)
    dsums_rows, du_rows, ddts_rows = dsums.reshape(flat), du.reshape(flat), ddts.reshape(flat)
    h = np.empty((TILE + 1, *A.shape[2:]), np.float32)
    decays = np.empty((TILE, *A.shape[2:]), np.float32)
    dB_lanes = np.zeros((TILE, *A.shape[2:]), np.float32)
    dC_lanes = np.zeros((TILE, *A.shape[2:]), np.float32)
    dD_sums, dbias_sums = np.zeros(group_width, np.float32), np.zeros(group_width, np.float32)

    for task in range(first, last):
        b, g = task // groups, task % groups
        channel = g * group_width
        width = min(group_width, d_inner - channel)
        used = (width + LANES - 1) // LANES
        dts_rows[:, width:] = ZERO
        u_rows[:, width:] = ZERO
        dsums_rows[:, width:] = ZERO
        for tile in range((seqlen + TILE - 1) // TILE - 1, -1, -1):
            start = tile * TILE
            steps = min(TILE, seqlen - start)
            read_inputs(
                x, dt, dt_bias, dt_softplus, b, start, steps, channel, width, dts_rows, u_rows
            )
            for t in range(steps):
                dy_row = row(dy, b, start + t, channel, width)
                if z is None:
                    for c in range(width):
                        dsums_rows[t, c] = load(dy_row, c)
                else:
                    z_row = row(z, b, start + t, channel, width)
                    for c in range(width):
                        z_c = load(z_row, c)
                        dsums_rows[t, c] = load(dy_row, c) * (z_c * sigmoid(z_c))
            for j in range(used):
                h[0] = saved[b, tile, g, j]
                replay(dts, u, A, B, C, restart, b, start, steps, g, j, h, decays, sums)
                adjoint(
                    dts, u, A, B, C, b, start, steps, g, j, h, decays, dsums, dh[b, g], dA[b, g],
                    dB_lanes if B.ndim == 3 else dB[b],
                    dC_lanes if C.ndim == 3 else dC[b],
                    du, ddts,
                )  # fmt: skip
            if B.ndim == 3:
                add_lanes(dB_lanes, steps, dB[g, b, start:])
            if C.ndim == 3:
                add_lanes(dC_lanes, steps, dC[g, b, start:])
            for t in range(steps):
                x_row = row(x, b, start + t, channel, width)
                dx_row = row(dx, b, start + t, channel, width)
                D_row = D[channel : channel + width]
                if z is not None:
                    z_row = row(z, b, start + t, channel, width)
                    dy_row = row(dy, b, start + t, channel, width)
                    dz_row = row(dz, b, start + t, channel, width)
                    for c in range(width):
                        z_c = load(z_row, c)
                        s = sigmoid(z_c)
                        slope = s * (ONE + z_c * (ONE - s))
                        gated = sums_rows[t, c] + D_row[c] * load(x_row, c)
                        store(dz_row, c, load(dy_row, c) * gated * slope)
                for c in range(width):
                    store(dx_row, c, du_rows[t, c] * dts_rows[t, c] + D_row[c] * dsums_rows[t, c])
                for c in range(width):
                    dD_sums[c] += dsums_rows[t, c] * load(x_row, c)
                for c in range(width):
                    ddts_rows[t, c] += du_rows[t, c] * load(x_row, c)
                if dt_softplus:
                    dt_row, bias = (
                        row(dt, b, start + t, channel, width),
                        dt_bias[channel : channel + width],
                    )
                    for c in range(width):
                        ddts_rows[t, c] *= sigmoid(load(dt_row, c) + bias[c])
                for c in range(width):
                    dbias_sums[c] += ddts_rows[t, c]
                ddt_row = row(ddt, b, start + t, channel, width)
                for c in range(width):
                    store(ddt_row, c, ddts_rows[t, c])
            flush(dD_sums, dD[b, channel : channel + width])
            flush(dbias_sums, ddt_bias[b, channel : channel + width])
