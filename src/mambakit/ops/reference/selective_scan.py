"""The selective scan as the equations say it, one time step after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition; arguments as in `mambakit.ops.selective_scan`."""
    batch, seqlen, d_inner = x.shape
    real = torch.promote_types(x.dtype, torch.float32)
    state_dtype = torch.promote_types(real, A.dtype)
    out_dtype = x.dtype

    x, dt, A = x.to(real), dt.to(real), A.to(state_dtype)
    B, C = B.to(state_dtype), C.to(state_dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(real)
    if dt_softplus:
        dt = torch.logaddexp(dt, torch.zeros_like(dt))

    h = x.new_zeros(batch, d_inner, A.shape[1], dtype=state_dtype)
    if initial_state is not None:
        h = h + initial_state
    ys = []
    for t in range(seqlen):
        if seq_idx is not None and t > 0:
            h = h * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
        decay = torch.exp(dt[:, t, :, None] * A)
        h = decay * h + (dt[:, t] * x[:, t])[..., None] * at_step(B, t, d_inner)
        y = (h * at_step(C, t, d_inner)).sum(-1)
        ys.append(2 * y.real if y.is_complex() else y)

    y = torch.stack(ys, dim=1) if ys else x * 0
    if D is not None:
        y = y + D.to(real) * x
    if z is not None:
        y = y * silu(z.to(real))
    return y.to(out_dtype), h


def at_step(parameter: Tensor, t: int, d_inner: int) -> Tensor:
    """B or C at time t, broadcastable to (B, D, N), from (D, N), (B, L, N) or (B, L, G, N)."""
    if parameter.ndim == 2:
        return parameter
    if parameter.ndim == 3:
        return parameter[:, t, None]
    groups = parameter.shape[2]
    return parameter[:, t].repeat_interleave(d_inner // groups, dim=1)


def selective_scan_step(
    ssm_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """One step of the same recurrence; arguments as in `mambakit.ops.selective_scan_step`."""
    batch = x.shape[0]
    y, state = selective_scan(
        x[:, None],
        dt[:, None],
        A,
        B.expand(batch, *B.shape[1:])[:, None],
        C.expand(batch, *C.shape[1:])[:, None],
        D,
        None if z is None else z[:, None],
        dt_bias,
        dt_softplus,
        ssm_state,
        None,
    )
    ssm_state.copy_(state)
    return y[:, 0]
