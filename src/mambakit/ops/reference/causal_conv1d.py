"""The causal depthwise convolution as its equation says it, one tap after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from mambakit.ops import conv_state


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition; arguments as in `mambakit.ops.causal_conv1d`."""
    seqlen, width = x.shape[1], weight.shape[1]
    real = torch.promote_types(x.dtype, torch.float32)
    past = conv_state.initial(x, width, initial_state)
    inputs = torch.cat([past, x], dim=1).to(real)  # (B, W-1+L, D)

    y = torch.zeros_like(x, dtype=real)
    for tap in range(width):
        met = inputs[:, tap : tap + seqlen]
        if seq_idx is not None:
            met = met * (width - 1 - tap <= conv_state.age(seq_idx))[..., None]
        y = y + weight[:, tap].to(real) * met
    if bias is not None:
        y = y + bias.to(real)
    if activation == "silu":
        y = silu(y)
    return y.to(x.dtype), conv_state.final(x, past, seq_idx)


def causal_conv1d_step(
    conv_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    """One step of the same convolution; arguments as in `mambakit.ops.causal_conv1d_step`."""
    y, state = causal_conv1d(x[:, None], weight, bias, activation, conv_state, None)
    conv_state.copy_(state)
    return y[:, 0]
