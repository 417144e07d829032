"""`causal_conv1d.cpp_functions`: forward, backward and update as plain functions, outside of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.compat.causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_update,
)


@torch.no_grad()
def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """`causal_conv1d_fn` without gradients; final states are written to `final_states_out`, if given."""
    y, state = causal_conv1d_fn(
        x, weight, bias, seq_idx, initial_states, True, activation=_name(silu_activation)
    )
    if final_states_out is not None:
        final_states_out.copy_(state)
    return y


@torch.enable_grad()
def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x (written to `dx`, if given), weight, bias and initial states."""
    present = {"x": x, "weight": weight, "bias": bias}
    if return_dinitial_states:
        present["initial_states"] = initial_states
    leaves = {k: t.detach().requires_grad_() for k, t in present.items() if t is not None}
    arguments: Any = {"bias": None, "initial_states": initial_states, **leaves}
    outputs = causal_conv1d_fn(
        **arguments,
        seq_idx=seq_idx,
        return_final_states=True,
        activation=_name(silu_activation),
    )
    dstate = torch.zeros_like(outputs[1]) if dfinal_states is None else dfinal_states
    gradients = torch.autograd.grad(outputs, [*leaves.values()], (dout, dstate), allow_unused=True)
    found = dict(zip(leaves, gradients, strict=True))
    dx = found["x"] if dx is None else dx.copy_(found["x"])
    return dx, found["weight"], found.get("bias"), found.get("initial_states")


@torch.no_grad()
def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """`causal_conv1d_update` without gradients."""
    state = cache_seqlens, conv_state_indices
    return causal_conv1d_update(x, conv_state, weight, bias, _name(silu_activation), *state)


def _name(silu_activation: bool) -> str | None:
    return "silu" if silu_activation else None
