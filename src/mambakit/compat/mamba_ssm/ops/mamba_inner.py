"""The mixer behind its first projection as one function; `selective_scan_interface` exports it."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from mambakit.nn.linear import project_to
from mambakit.nn.mixer import RECOMPUTES_ON
from mambakit.nn.recomputation import Recomputation
from mambakit.ops import causal_conv1d, rms_norm, selective_scan


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Convolution, projections, scan, gate and output of a mixer.

    Args:
        xz: Output of in_proj, (B, 2 D, L).
        conv1d_weight: (D, 1, W).
        conv1d_bias: (D,).
        x_proj_weight: (R + N + N, D), for delta, B and C; without the rows of a B or C that is given.
            With complex A they have 2 N rows, re and im alternating.
        delta_proj_weight: (D, R).
        out_proj_weight: (M, D).
        out_proj_bias: (M,).
        A: (D, N), real or complex.
        B: Constant input weights, (D, N). Default: they come from x_proj.
        C: Constant output weights, (D, N). Default: they come from x_proj.
        D: (D,).
        delta_bias: (D,).
        B_proj_bias: Added to what x_proj makes for B.
        C_proj_bias: The same for C.
        delta_softplus: Whether softplus is applied to delta (+ delta_bias).
        checkpoint_lvl: 1: on a GPU the backward pass makes the output of the convolution and delta
            again; 0: they are kept.
        b_rms_weight: Weight of an RMS norm of B, (N,), as in FalconMamba. Default: no norm.
        c_rms_weight: The same for C.
        dt_rms_weight: The same for the R outputs of x_proj that delta is made from, (R,). A weight
            (D,), such as transformers gives, is multiplied after the projection.
        b_c_dt_rms_eps: Added to the mean squares of those norms.

    Returns:
        (B, L, M).

    Source: the authors' function, which takes the norm of delta after its projection. FalconMamba
    was trained with the norm in front of it, and transformers evaluates it so.
    """
    return _inner(
        xz, (conv1d_weight, conv1d_bias), x_proj_weight, delta_proj_weight,
        (out_proj_weight, out_proj_bias), A, B, C, D, delta_bias, (None, B_proj_bias, C_proj_bias),
        delta_softplus, (dt_rms_weight, b_rms_weight, c_rms_weight), b_c_dt_rms_eps,
        recomputes=checkpoint_lvl > 0,
    )  # fmt: skip


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` that keeps all and makes nothing again; as the authors' it runs the same kernels.

    A comparison in float32 would show rounding alone: their test has outputs of 1e5.
    """
    return _inner(
        xz, (conv1d_weight, conv1d_bias), x_proj_weight, delta_proj_weight,
        (out_proj_weight, out_proj_bias), A, B, C, D, delta_bias, (None, B_proj_bias, C_proj_bias),
        delta_softplus, (None, None, None), 1.0, recomputes=False,
    )  # fmt: skip


_Three: TypeAlias = "tuple[Tensor | None, Tensor | None, Tensor | None]"
"""Something of dt, B and C."""


def _inner(
    xz: Tensor,
    conv1d: tuple[Tensor, Tensor | None],
    x_proj: Tensor,
    delta_proj: Tensor,
    out_proj: tuple[Tensor, Tensor | None],
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    biases: _Three,
    delta_softplus: bool,
    norms: _Three,
    eps: float,
    *,
    recomputes: bool,
) -> Tensor:
    x, z = (half.transpose(1, 2) for half in xz.chunk(2, dim=1))
    delta_proj, norms = _norm_in_front(delta_proj, norms)
    numbers = A.shape[1] * (2 if A.is_complex() else 1)
    sizes = [delta_proj.shape[1], 0 if B is not None else numbers, 0 if C is not None else numbers]
    with Recomputation(wanted=recomputes and xz.device.type in RECOMPUTES_ON) as again:
        inputs = x, conv1d[0].squeeze(1), conv1d[1]
        x = _convolve(*inputs)
        again.instead_of(x, _convolve, *inputs)
        parts = torch.split(linear(x, x_proj), sizes, dim=-1)
        dt, B_t, C_t = (
            _finished(*of_one, eps) for of_one in zip(parts, biases, norms, strict=True)
        )
        B = as_numbers(B_t, A) if B is None else B
        C = as_numbers(C_t, A) if C is None else C
        delta = linear(dt, delta_proj)
        again.instead_of(delta, project_to(delta.dtype), dt, delta_proj)
        y, _ = selective_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    weight, bias = out_proj
    return linear(y, weight, None if bias is None else bias.to(weight.dtype))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return causal_conv1d(x, weight, bias, "silu")[0]


def _norm_in_front(delta_proj: Tensor, norms: _Three) -> tuple[Tensor, _Three]:
    """With a norm weight of D numbers: the projection that multiplies by it, and a weight of ones."""
    weight = norms[0]
    if weight is None or weight.shape[0] == delta_proj.shape[1]:
        return delta_proj, norms
    ones = weight.new_ones(delta_proj.shape[1])
    return delta_proj * weight[:, None].to(delta_proj.dtype), (ones, *norms[1:])


def _finished(part: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float) -> Tensor:
    """An output of x_proj with its bias and its norm."""
    if bias is not None:
        part = part + bias.to(part.dtype)
    return part if norm is None else rms_norm(part, norm, eps)


def as_numbers(weight: Tensor, A: Tensor) -> Tensor:
    """B or C, complex if A is: then its last dimension has re and im alternating."""
    if not A.is_complex():
        return weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    pairs = weight.reshape(*weight.shape[:-1], -1, 2).to(wide)
    return torch.complex(pairs[..., 0], pairs[..., 1])
