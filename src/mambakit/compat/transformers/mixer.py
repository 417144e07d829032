"""The forward of transformers' MambaMixer, FalconMambaMixer and JambaMambaMixer on our operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mambakit.ops import causal_conv1d, selective_scan, selective_scan_step


def forward(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Mix a sequence, and go on from the cache with any number of positions.

    Args:
        self: The mixer: in_proj, conv1d, x_proj, dt_proj, out_proj, A_log and D; FalconMamba and Jamba
            have norms of dt, B and C as well.
        hidden_states: (B, L, M).
        cache_params: A `Cache`, of which layer `self.layer_idx` is read and updated.
        attention_mask: (B, at least L), 0 for padding.
        kwargs: Of them `seq_idx`, the document number of each position, (B, L).

    Returns:
        (B, L, M).
    """
    seqlen, layer = hidden_states.shape[1], self.layer_idx
    mask = None if attention_mask is None else attention_mask[:, -seqlen:, None]
    conv_state = ssm_state = None
    if cache_params is not None:
        conv_state = cache_params.get_conv_state(layer)
        ssm_state = cache_params.get_recurrent_state(layer)
    seq_idx = kwargs.get("seq_idx")

    inputs, z = self.in_proj(_masked(hidden_states, mask)).chunk(2, dim=-1)
    x = _masked(_convolve(self, inputs, conv_state, seq_idx), mask)
    dt, B, C = self.x_proj(x).split(
        [self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1
    )
    if hasattr(self, "dt_layernorm"):
        dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
    dt, dt_bias = _project(self.dt_proj, dt)
    A = -torch.exp(self.A_log.float())
    if ssm_state is not None and seqlen == 1 and not torch.is_grad_enabled():
        state = ssm_state.float()
        steering = (dt[:, 0], A, B[:, 0], C[:, 0], self.D, z[:, 0], dt_bias)
        y = selective_scan_step(state, x[:, 0], *steering, True)[:, None]
    else:
        scanned = (x, dt, A, B, C, self.D, z, dt_bias, True)
        y, state = selective_scan(*scanned, initial_state=ssm_state, seq_idx=seq_idx)
    if cache_params is not None:
        width = self.conv1d.kernel_size[0]
        cache_params.update_conv_state(inputs.transpose(1, 2), layer, conv_kernel_size=width)
        if state is not ssm_state:
            cache_params.update_recurrent_state(state, layer)
    out: Tensor = self.out_proj(y)
    return out


def _masked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Zero for padding."""
    return hidden if mask is None else (hidden * mask).to(hidden.dtype)


def _convolve(self: Any, x: Tensor, conv_state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    weight = self.conv1d.weight.squeeze(1)
    is_silu = self.activation in ("silu", "swish")
    past = None
    if conv_state is not None:
        # It holds one input more than the next position needs, or all that there were.
        past = conv_state[..., conv_state.shape[-1] - weight.shape[1] + 1 :]
    y, _ = causal_conv1d(
        x,
        weight,
        self.conv1d.bias,
        "silu" if is_silu else None,
        initial_state=past,
        seq_idx=seq_idx,
    )
    return y if is_silu else self.act(y)


def _project(dt_proj: nn.Module, dt: Tensor) -> tuple[Tensor, Tensor | None]:
    """dt of every channel, and the bias that the scan adds to it in float32."""
    if type(dt_proj) is nn.Linear:
        return linear(dt, dt_proj.weight), dt_proj.bias
    # An adapter or a quantised layer: only as a whole is it what it should be.
    projected: Tensor = dt_proj(dt)
    return projected, None
