"""Initial values of the recurrence (Gu & Dao 2023, section 3.6, and the authors' code)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def a_log_init(d_inner: int, d_state: int, A_init: str) -> Tensor:
    """log(-Re A), (D, N), float32.

    A_n is -(n+1) for "s4d-real", -exp(N(0, 1)) for "random", and has the real part -1/2 for
    "constant" and "s4d-lin".
    """
    if A_init == "s4d-real":
        row = torch.arange(1, d_state + 1, dtype=torch.float32).log()
        return row.repeat(d_inner, 1)
    if A_init == "random":
        return torch.randn(d_inner, d_state, dtype=torch.float32)
    return torch.full((d_inner, d_state), math.log(0.5), dtype=torch.float32)


def a_imag_init(d_inner: int, d_state: int) -> Tensor:
    """Im A of "s4d-lin", A_n = -1/2 + ni: (D, N), float32."""
    return torch.arange(d_state, dtype=torch.float32).repeat(d_inner, 1)


def b_init(d_inner: int, d_state: int, is_complex: bool) -> Tensor:
    """A B that does not depend on the input, 1 as in S4D: (D, N), or (D, N, 2) with re and im."""
    one = torch.ones(d_inner, d_state, dtype=torch.float32)
    return torch.stack([one, torch.zeros_like(one)], dim=-1) if is_complex else one


def c_init(d_inner: int, d_state: int, is_complex: bool) -> Tensor:
    """A C that does not depend on the input, N(0, 1) as in S4D: (D, N), or (D, N, 2)."""
    if is_complex:
        return math.sqrt(0.5) * torch.randn(d_inner, d_state, 2, dtype=torch.float32)
    return torch.randn(d_inner, d_state, dtype=torch.float32)


def dt_bias_init(d_inner: int, dt_min: float, dt_max: float, dt_init_floor: float) -> Tensor:
    """The b for which dt = softplus(b) is log-uniform in [dt_min, dt_max]: (D,), float32.

    The paper says uniform; we follow its code. softplus^-1(dt) = dt + log(1 - exp(-dt)).
    """
    log_dt = torch.empty(d_inner, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max))
    dt = log_dt.exp().clamp(min=dt_init_floor)
    return dt + torch.log(-torch.expm1(-dt))
