"""The selective scan (Mamba-1, "S6"): the recurrence over a whole sequence, and one step of it."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.errors import DtypeError, ShapeError
from mambakit.ops.checks import (
    check_device,
    check_float,
    check_in_place,
    check_integer,
    check_rank,
    check_shape,
)
from mambakit.ops.dispatch import implementation


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Run the selective state space recurrence over a whole sequence.

    For every batch row, channel d and state n, with dt_t = softplus(dt_t + dt_bias) if asked for:

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t
        y_t = sum_n C_t h_t + D x_t,   then   y_t silu(z_t)

    With complex A, h is complex and y_t = 2 Re(sum_n C_t h_t) + D x_t: each state stands for a conjugate pair.

    Args:
        x: Input, (B, L, D), float32, bfloat16, float16 (float64 with the reference backend).
        dt: Step size, (B, L, D). After bias and softplus it is >= 0, in units of 1 / |A|.
        A: Decay rates, (D, N), real or complex, with a negative real part.
        B: Input weights, (B, L, N); (B, L, G, N) for G groups of D / G neighbouring channels; or (D, N),
            constant in time. Complex only with complex A.
        C: Output weights, shaped like B or in any other of these forms.
        D: Skip weights, (D,). Default: no skip.
        z: Gate, (B, L, D). Default: no gate.
        dt_bias: Added to dt in float32, (D,).
        dt_softplus: Whether softplus is applied to dt (+ dt_bias).
        initial_state: State before step 0, (B, D, N), float32 (complex64 for complex A). Default: zeros.
        seq_idx: Document number of each position, (B, L), int32 or int64. Where it changes, the state
            starts afresh from zero; `initial_state` belongs to the document of position 0.
        backend: "auto", "cuda", "cpu" or "reference"; see `mambakit.ops.dispatch`.

    Returns:
        y, (B, L, D), in the dtype of x; and the final state, (B, D, N), float32 (complex64; float64 for float64 x).
        All inputs but seq_idx have gradients, through both outputs.

    Raises:
        ShapeError, DtypeError: An argument does not fit; the message says which, got and wanted.
        BackendError: The named backend cannot run this call here.

    Numerics: state and sums in float32 (float64 for float64 x) whatever the dtype of x.
    Source: Gu & Dao 2023 (arXiv 2312.00752), equation 2 and algorithm 2. A is discretised by zero-order hold and B
    by Euler's rule (dt B), as in the authors' code, not by equation 4. Derivation: docs/maths/selective-scan.md.

    Example:
        >>> import torch
        >>> x, dt = torch.ones(1, 3, 1), torch.ones(1, 3, 1)
        >>> A, ones = torch.full((1, 1), -0.6931472), torch.ones(1, 3, 1)  # exp(A) = 1/2
        >>> y, state = selective_scan(x, dt, A, ones, ones)
        >>> y.flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    run = implementation("selective_scan", backend, x.device, _kernel_dtype(x, A))
    y, state = run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx)
    return y, state


def selective_scan_step(
    ssm_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Advance the recurrence of `selective_scan` by one step, in place.

    Args:
        ssm_state: State, (B, D, N), float32 (complex64 for complex A; float64 with the reference). Updated in place.
        x: Input, (B, D).
        dt: Step size, (B, D).
        A: Decay rates, (D, N).
        B: Input weights, (B, N), (B, G, N) for groups, or (1, D, N) for weights that are constant in time.
        C: Output weights, in any of these forms.
        D: Skip weights, (D,).
        z: Gate, (B, D).
        dt_bias: Added to dt, (D,).
        dt_softplus: Whether softplus is applied to dt (+ dt_bias).
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        y, (B, D), in the dtype of x.

    Raises:
        ShapeError, DtypeError: An argument does not fit.
        ArgumentError: A gradient was asked for; an in-place step has none.
        BackendError: The named backend cannot run this call here.

    Example:
        >>> import torch
        >>> state = torch.ones(1, 1, 1)
        >>> one = torch.ones(1, 1)
        >>> selective_scan_step(state, x=one, dt=one, A=-0.6931472 * one, B=one, C=one)
        tensor([[1.5000]])
        >>> state.item()
        1.5
    """
    _check_step(ssm_state, x, dt, A, B, C, D, z, dt_bias)
    dtype = _kernel_dtype(x, A)
    run = implementation("selective_scan_step", backend, x.device, dtype)
    y: Tensor = run(ssm_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return y


def _state_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, torch.float32), A.dtype)


def _kernel_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """The dtype that decides whether a backend can: that of the state, or of x where the state is float32."""
    state = _state_dtype(x, A)
    return x.dtype if state == torch.float32 else state


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    check_rank("x", x, 3, "(B, L, D)")
    batch, seqlen, d_inner = x.shape
    _check_parameters(x, A, D, dt_bias)
    d_state = A.shape[1]
    check_shape("dt", dt, x.shape, letters="(B, L, D)")
    check_shape("z", z, x.shape, letters="(B, L, D)")
    for name, weight in (("B", B), ("C", C)):
        allowed = [(d_inner, d_state), (batch, seqlen, d_state)]
        if weight.ndim == 4:
            allowed = [(batch, seqlen, _groups(name, weight, d_inner), d_state)]
        check_shape(name, weight, *allowed, letters="(D, N) or (B, L, N) or (B, L, G, N)")
    check_shape("initial_state", initial_state, (batch, d_inner, d_state), letters="(B, D, N)")
    check_shape("seq_idx", seq_idx, (batch, seqlen), letters="(B, L)")
    check_float(x=x, dt=dt, z=z)
    _check_kinds(A, B=B, C=C, initial_state=initial_state)
    check_integer(seq_idx=seq_idx)
    check_device(x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    check_device(x, initial_state=initial_state, seq_idx=seq_idx)


def _check_step(
    ssm_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    check_rank("x", x, 2, "(B, D)")
    batch, d_inner = x.shape
    _check_parameters(x, A, D, dt_bias)
    d_state = A.shape[1]
    check_shape("dt", dt, x.shape, letters="(B, D)")
    check_shape("z", z, x.shape, letters="(B, D)")
    for name, weight in (("B", B), ("C", C)):
        allowed = [(batch, d_state), (1, d_inner, d_state)]
        if weight.ndim == 3:
            allowed.append((batch, _groups(name, weight, d_inner), d_state))
        check_shape(name, weight, *allowed, letters="(B, N) or (B, G, N) or (1, D, N)")
    check_shape("ssm_state", ssm_state, (batch, d_inner, d_state), letters="(B, D, N)")
    check_float(x=x, dt=dt, z=z)
    _check_kinds(A, B=B, C=C)
    check_device(x, ssm_state=ssm_state, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    check_in_place("ssm_state", ssm_state, _state_dtype(x, A), x, dt, A, B, C, D, z, dt_bias)


def _check_parameters(x: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> None:
    d_inner = x.shape[-1]
    check_rank("A", A, 2, "(D, N)")
    check_shape("A", A, (d_inner, max(A.shape[1], 1)), letters="(D, N)")
    check_shape("D", D, (d_inner,), letters="(D,)")
    check_shape("dt_bias", dt_bias, (d_inner,), letters="(D,)")
    check_float(D=D, dt_bias=dt_bias)
    check_float(A=A, complex_allowed=True)


def _check_kinds(A: Tensor, **tensors: Tensor | None) -> None:
    check_float(complex_allowed=True, **tensors)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_complex() and not A.is_complex():
            raise DtypeError(f"{name}: got dtype {tensor.dtype} with real A, wanted a real dtype")


def _groups(name: str, weight: Tensor, d_inner: int) -> int:
    groups = weight.shape[-2]
    if groups == 0 or d_inner % groups:
        raise ShapeError(f"{name}: got {groups} groups, wanted a divisor of the {d_inner} channels")
    return groups
