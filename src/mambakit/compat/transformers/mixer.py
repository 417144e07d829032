"""The forward of transformers' MambaMixer, FalconMambaMixer and JambaMambaMixer on our operations."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mambakit.compat.transformers.fused_step import fused_step
from mambakit.nn.linear import project_to
from mambakit.nn.mixer import RECOMPUTES_ON
from mambakit.nn.recomputation import Recomputation, is_plain
from mambakit.ops import (
    causal_conv1d,
    causal_conv1d_step,
    selective_scan,
    selective_scan_step,
)
from mambakit.ops.linear import linear_step


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
    # All of it in one call where that can be.
    is_plain_step = mask is None and seq_idx is None and _is_step(hidden_states)
    if conv_state is not None and ssm_state is not None and is_plain_step:
        stepped = fused_step(self, hidden_states[:, 0], conv_state, ssm_state)
        if stepped is not None:
            y, newest = stepped
            _remember(self, cache_params, newest)
            return y[:, None]

    inputs, z = _applied(self.in_proj, _masked(hidden_states, mask)).chunk(2, dim=-1)
    # The backward pass needs x and dt, each as large as z, but they are cheap to make again.
    with Recomputation(wanted=hidden_states.device.type in RECOMPUTES_ON) as again:
        is_silu = self.activation in ("silu", "swish")
        convolve = partial(_convolve, activation=None if is_silu else self.act)
        past = None if conv_state is None else _past(conv_state, self.conv1d.weight.shape[-1])
        read = self.conv1d.weight, self.conv1d.bias, inputs, past, seq_idx, mask
        x = convolve(*read)
        again.instead_of(x, convolve, *read)
        dt, B, C = torch.split(
            _applied(self.x_proj, x),
            [self.time_step_rank, self.ssm_state_size, self.ssm_state_size],
            dim=-1,
        )
        if hasattr(self, "dt_layernorm"):
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        dt, dt_bias = _project(self.dt_proj, dt, again)
        # Not exp, which wakes a second thread for few numbers: see `MambaMixer._decay`.
        A = -torch.exp2(self.A_log.float() / math.log(2))
        steering = dt, A, B, C, self.D, z, dt_bias, True
        if ssm_state is not None and _is_step(x):
            y, state = _step(ssm_state, x, *steering)
        else:
            y, state = selective_scan(x, *steering, initial_state=ssm_state, seq_idx=seq_idx)
    if cache_params is not None:
        _remember(self, cache_params, inputs.transpose(1, 2))
        if state is not ssm_state:
            cache_params.update_recurrent_state(state, layer)
    return _applied(self.out_proj, y)


def _remember(mixer: Any, cache_params: Any, inputs: Tensor) -> None:
    """Add inputs of the convolution, (B, D, L), to the cache."""
    width = mixer.conv1d.kernel_size[0]
    cache_params.update_conv_state(inputs, mixer.layer_idx, conv_kernel_size=width)


def _applied(layer: Any, x: Tensor) -> Tensor:
    """layer(x)."""
    if is_plain(layer, nn.Linear) and _is_step(x):
        return _product(x, layer.weight, layer.bias)
    y: Tensor = layer(x)
    return y


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer; for one position its matrix is read at the memory's speed."""
    if _is_step(x) and x.dtype == weight.dtype and not torch.compiler.is_compiling():
        return linear_step(x[:, 0], weight, bias)[:, None]
    return linear(x, weight, bias)


def _is_step(x: Tensor) -> bool:
    """One position, of which no gradient is asked for."""
    return x.shape[1] == 1 and not torch.is_grad_enabled()


def _masked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Zero for padding."""
    return hidden if mask is None else (hidden * mask).to(hidden.dtype)


def _past(conv_state: Tensor, width: int) -> Tensor:
    """The inputs that the next position needs; a cache has at least one more."""
    return conv_state[..., conv_state.shape[-1] - width + 1 :]


def _convolve(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    past: Tensor | None,
    seq_idx: Tensor | None,
    mask: Tensor | None,
    activation: Any,
) -> Tensor:
    """The convolution and its activation; None is SiLU, within the operation."""
    name = "silu" if activation is None else None
    filters = weight.squeeze(1), bias, name
    if past is not None and seq_idx is None and _is_step(x):
        # In a copy: the cache takes the input by itself.
        state = past.to(x.dtype, copy=True, memory_format=torch.contiguous_format)
        y = causal_conv1d_step(state, x[:, 0], *filters)[:, None]
    else:
        y, _ = causal_conv1d(x, *filters, initial_state=past, seq_idx=seq_idx)
    return _masked(y if activation is None else activation(y), mask)


def _project(dt_proj: nn.Module, dt: Tensor, again: Recomputation) -> tuple[Tensor, Tensor | None]:
    """dt of every channel, and the bias that the scan adds to it in float32."""
    if type(dt_proj) is not nn.Linear:
        # An adapter or a quantised layer: only as a whole is it what it should be.
        return dt_proj(dt), None
    projected = _product(dt, dt_proj.weight, None)
    again.instead_of(projected, project_to(projected.dtype), dt, dt_proj.weight)
    return projected, dt_proj.bias


def _step(
    ssm_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """y of one position, and the state after it: the same tensor if it is float32."""
    state = ssm_state.float()
    at_it = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0])
    return selective_scan_step(state, *at_it, *rest)[:, None], state
