"""What the official functions compute, step by step in float64 and (B, D, L); for the tests of `compat`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, silu, softplus


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Output and last state of `selective_scan_fn`."""
    batch, channels, seqlen = u.shape
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = softplus(delta) if delta_softplus else delta
    B, C = (in_time(weight, A, batch, channels, seqlen) for weight in (B, C))
    h, ys = torch.zeros(batch, *A.shape, dtype=A.dtype, device=A.device), []
    for t in range(seqlen):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * u[:, :, t, None] * B[..., t]
        y = (h * C[..., t]).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(ys, dim=-1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * silu(z)), h


def in_time(weight: Tensor, A: Tensor, batch: int, channels: int, seqlen: int) -> Tensor:
    """B or C as (B, D, N, L)."""
    if weight.ndim == 2:
        return weight[None, ..., None].expand(batch, -1, -1, seqlen)
    if A.is_complex():
        weight = torch.complex(weight[..., ::2], weight[..., 1::2])
    weight = weight[:, None] if weight.ndim == 3 else weight
    return weight.repeat_interleave(channels // weight.shape[1], dim=1)


def conv(x, weight, bias=None, initial_states=None, activation=None):
    """Output and last inputs of `causal_conv1d_fn`."""
    width = weight.shape[1]
    x = pad(x, (width - 1, 0)) if initial_states is None else torch.cat([initial_states, x], dim=-1)
    y = torch.nn.functional.conv1d(x, weight[:, None], bias, groups=weight.shape[0])
    return (y if activation is None else silu(y)), x[..., x.shape[-1] - width + 1 :]


def rms(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A,
    B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True,
    b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    """Output of `mamba_inner_fn`, with the norm of dt in front of its projection."""
    x, z = xz.chunk(2, dim=1)
    x, _ = conv(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    numbers = A.shape[1] * (2 if A.is_complex() else 1)
    rank = delta_proj_weight.shape[1]
    projected = linear(x.transpose(1, 2), x_proj_weight)
    dt = projected[..., :rank]
    if dt_rms_weight is not None:
        dt = rms(dt, 1, b_c_dt_rms_eps)
        dt = dt * dt_rms_weight if dt_rms_weight.shape[0] == rank else dt
    delta = linear(dt, delta_proj_weight)
    if dt_rms_weight is not None and dt_rms_weight.shape[0] != rank:
        delta = delta * dt_rms_weight
    if B is None:
        B = projected[..., rank : rank + numbers]
        B = B if B_proj_bias is None else B + B_proj_bias
        B = B if b_rms_weight is None else rms(B, b_rms_weight, b_c_dt_rms_eps)
        B = in_pairs(B, A)
    if C is None:
        C = projected[..., projected.shape[-1] - numbers :]
        C = C if C_proj_bias is None else C + C_proj_bias
        C = C if c_rms_weight is None else rms(C, c_rms_weight, b_c_dt_rms_eps)
        C = in_pairs(C, A)
    y, _ = scan(x, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    return linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def in_pairs(weight: Tensor, A: Tensor) -> Tensor:
    """(B, L, N) to (B, N, L); (B, L, 2 N) to (B, N, 2 L) for a complex A."""
    if not A.is_complex():
        return weight.transpose(1, 2)
    batch, seqlen, numbers = weight.shape
    pairs = weight.view(batch, seqlen, numbers // 2, 2)
    return pairs.transpose(1, 2).reshape(batch, numbers // 2, 2 * seqlen)
