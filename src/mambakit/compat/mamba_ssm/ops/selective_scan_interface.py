"""`mamba_ssm.ops.selective_scan_interface`: the scan with the authors' signature, and the names beside it.

Names are theirs: u is x, delta is dt, and everything is (B, D, L). Any layout in memory is taken. Of
channels that are neighbours in memory, as a matrix product followed by a transpose leaves them,
nothing is copied.
"""

from __future__ import annotations

from torch import Tensor

from mambakit.compat.mamba_ssm.ops.mamba_inner import (
    as_numbers,
    mamba_inner_fn,
    mamba_inner_ref,
)
from mambakit.compat.mamba_ssm.ops.triton.layer_norm import layer_norm_fn
from mambakit.ops import selective_scan

__all__ = [
    "MambaInnerFn",
    "SelectiveScanFn",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "rms_norm_forward",
    "selective_scan_fn",
    "selective_scan_ref",
]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence of `mambakit.ops.selective_scan`.

    Args:
        u: Input, (B, D, L).
        delta: Step size, (B, D, L).
        A: Decay rates, (D, N), real or complex.
        B: Input weights: (D, N), (B, N, L) or (B, G, N, L); with complex A the last two have 2 L
            numbers, re and im alternating.
        C: Output weights, in any of these forms.
        D: Skip weights, (D,).
        z: Gate, (B, D, L).
        delta_bias: Added to delta, (D,).
        delta_softplus: Whether softplus is applied to delta (+ delta_bias).
        return_last_state: Whether to return the last state too; here it has a gradient, and is
            right for a constant B.

    Returns:
        (B, D, L) in the dtype of u; and the last state, (B, D, N), if asked for.
    """
    arguments = u, delta, A, B, C, D, z, delta_bias, delta_softplus
    return _scan(*arguments, return_last_state, "auto")


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` by the reference backend."""
    arguments = u, delta, A, B, C, D, z, delta_bias, delta_softplus
    return _scan(*arguments, return_last_state, "reference")


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    y, state = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        _channels_last(B, A),
        _channels_last(C, A),
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        delta_softplus,
        backend=backend,
    )
    y = y.transpose(1, 2)
    return (y, state) if return_last_state else y


def _channels_last(weight: Tensor, A: Tensor) -> Tensor:
    """B or C in the form of our scan: (D, N), (B, L, N) or (B, L, G, N)."""
    if weight.ndim == 2:
        return weight
    return as_numbers(weight, A).movedim(-1, 1)


class SelectiveScanFn:
    """For code that calls `SelectiveScanFn.apply`; no node of autograd itself."""

    apply = staticmethod(selective_scan_fn)


class MambaInnerFn:
    """For code that calls `MambaInnerFn.apply`."""

    apply = staticmethod(mamba_inner_fn)


def rms_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6, is_rms_norm: bool = True
) -> Tensor:
    """The norm of x, (..., M): RMS norm or layer norm."""
    y: Tensor = layer_norm_fn(x, weight, bias, eps=eps, is_rms_norm=is_rms_norm)
    return y
