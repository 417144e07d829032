"""One step of the selective scan on the CPU; one task is one batch row."""

from __future__ import annotations

from mambakit.ops.cpu.kernels.decay import decay
from mambakit.ops.cpu.kernels.simd import dot, kernel, load, sigmoid, softplus, store


@kernel
def step(first, last, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, y):
    """Advance the state (B, D, N) and write y (B, D); B and C: (B or 1, groups, N). Complex where A is.

    The vector here is the states of one channel, which are neighbours in memory.
    """
    d_inner, d_state = A.shape
    for b in range(first, last):
        x_row, dt_row, y_row = x[b], dt[b], y[b]
        for c in range(d_inner):
            B_row = B[b % B.shape[0], c * B.shape[1] // d_inner]
            C_row = C[b % C.shape[0], c * C.shape[1] // d_inner]
            h, A_row = state[b, c], A[c]
            step_size = load(dt_row, c)
            if dt_bias is not None:
                step_size += dt_bias[c]
            if dt_softplus:
                step_size = softplus(step_size)
            u = step_size * load(x_row, c)
            for n in range(d_state):
                h[n] = decay(step_size, A_row[n]) * h[n] + u * B_row[n]
            total = dot(C_row, h)
            if D is not None:
                total += D[c] * load(x_row, c)
            if z is not None:
                z_c = load(z[b], c)
                total *= z_c * sigmoid(z_c)
            store(y_row, c, total)
