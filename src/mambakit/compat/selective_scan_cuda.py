"""`selective_scan_cuda`: the scan's forward and backward as plain functions, outside of autograd.

Names and layout as in `mambakit.compat.mamba_ssm.ops.selective_scan_interface`; B and C that vary in
time may be (B, G, N, L) or (B, N, L). On a CPU they work as well, in spite of the name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.compat.mamba_ssm.ops.selective_scan_interface import selective_scan_fn


@torch.no_grad()
def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """Run the recurrence.

    Returns:
        The output without the gate; x, (B, D, 1, 2 N), whose numbers 1, 3, 5, ... are the last state
        and whose others are zero; and the output with the gate, if there is z.
    """
    out, state = selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus, True)
    x = torch.stack([torch.zeros_like(state), state], dim=-1).flatten(-2)[:, :, None]
    if z is None:
        return [out, x]
    # A second run, since the gate of an output in half precision would round twice.
    out_z = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    assert isinstance(out_z, Tensor)
    return [out, x, out_z]


@torch.enable_grad()
def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """Gradients, from that of the (gated) output.

    Args:
        u: As in `fwd`, and so are the next seven and delta_softplus.
        delta: (B, D, L).
        A: (D, N).
        B: As in `selective_scan_fn`.
        C: As in `selective_scan_fn`.
        D: (D,).
        z: (B, D, L).
        delta_bias: (D,).
        dout: Gradient of the output, (B, D, L).
        x: Not needed here.
        out: Not needed here.
        dz: Where to write the gradient of z. Default: a new tensor.
        delta_softplus: Whether softplus is applied to delta (+ delta_bias).
        recompute_out_z: Whether to return the gated output too.

    Returns:
        Gradients of u, delta, A, B, C, D and delta_bias (None for what is absent); then that of z, and
        the gated output, if there is z.
    """
    inputs = [u, delta, A, B, C, D, z, delta_bias]
    leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in inputs]
    run: Any = selective_scan_fn
    y = run(*leaves, delta_softplus)
    present = [leaf for leaf in leaves if leaf is not None]
    assert isinstance(y, Tensor)
    found = iter(torch.autograd.grad(y, present, dout))
    du, ddelta, dA, dB, dC, dD, found_dz, dbias = (
        None if leaf is None else next(found) for leaf in leaves
    )
    gradients = [du, ddelta, dA, dB, dC, dD, dbias]
    if z is None:
        return gradients
    assert found_dz is not None
    gradients.append(found_dz if dz is None else dz.copy_(found_dz))
    return [*gradients, y.detach()] if recompute_out_z else gradients
