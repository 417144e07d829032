"""`mamba_ssm.ops.triton.selective_state_update`: one step of the scan with the authors' signature."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.errors import ShapeError
from mambakit.ops import selective_scan_step


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Advance the recurrence by one step; `state` is updated in place.

    Channels may be in H heads: then D stands for H, P below, and the G groups of B and C are of
    neighbouring heads.

    Args:
        state: (B, D, N), any float dtype; with `state_batch_indices` of more sequences than B.
        x: Input, (B, D).
        dt: Step size, (B, D).
        A: Decay rates, (D, N).
        B: Input weights, (B, N), or (B, G, N).
        C: Output weights, like B.
        D: Skip weights, (D,).
        z: Gate, (B, D).
        dt_bias: Added to dt, (D,).
        dt_softplus: Whether softplus is applied to dt (+ dt_bias).
        state_batch_indices: Which row of `state` belongs to each row of x, (B,).

    Returns:
        Like x.

    Numerics: computed in float32, whatever the dtype of the state.
    """
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, "auto")


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`selective_state_update` by the reference backend."""
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, None, "reference")


@torch.no_grad()
def _update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    indices: Tensor | None,
    backend: str,
) -> Tensor:
    if state.ndim not in (3, 4):
        raise ShapeError(f"state: got shape {tuple(state.shape)}, wanted (B, D, N) or (B, H, P, N)")
    rows = state if indices is None else state[indices.long()]
    wide = torch.promote_types(torch.promote_types(x.dtype, torch.float32), A.dtype)
    is_own = rows is state and state.dtype == wide and state.is_contiguous()
    flat = rows.flatten(1, -2) if is_own else rows.to(wide).flatten(1, -2).contiguous()
    x_flat, dt_flat, A_flat = x.flatten(1), dt.flatten(1), A.flatten(0, -2)
    D_flat, z_flat = (None if D is None else D.flatten()), (None if z is None else z.flatten(1))
    bias = None if dt_bias is None else dt_bias.flatten()
    arguments = x_flat, dt_flat, A_flat, B, C, D_flat, z_flat, bias, dt_softplus
    y = selective_scan_step(flat, *arguments, backend=backend)
    if indices is not None:
        state[indices.long()] = flat.view(rows.shape).to(state.dtype)
    elif not is_own:
        state.copy_(flat.view(state.shape))
    return y.view(x.shape)
