"""Root-mean-square normalisation, alone and fused with the addition to the residual stream."""

from __future__ import annotations

from torch import Tensor

from mambakit.ops.checks import check_device, check_float, check_shape
from mambakit.ops.dispatch import implementation


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str = "auto") -> Tensor:
    """Scale every row to a root mean square of one, then by the weight.

        y = x / sqrt(mean(x^2) + eps) * weight

    Args:
        x: Input, (..., M), any float dtype.
        weight: (M,).
        eps: Added to the mean square.
        backend: "auto", "cuda", "cpu" or "reference"; see `mambakit.ops.dispatch`.

    Returns:
        y, (..., M), in the dtype of x.

    Raises:
        ShapeError, DtypeError, ArgumentError: An argument does not fit.
        BackendError: The named backend cannot run this call here.

    Numerics: computed in float32 (float64 for float64 x).
    Source: Zhang & Sennrich 2019 (arXiv 1910.07467).

    Example:
        >>> import torch
        >>> rms_norm(torch.tensor([1.0, 7.0]), torch.ones(2), eps=0.0)  # the root mean square is 5
        tensor([0.2000, 1.4000])
    """
    _check(x, weight)
    run = implementation("rms_norm", backend, x.device, x.dtype)
    y: Tensor = run(x, weight, eps)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise the sum.

        residual' = x + residual        y = rms_norm(residual', weight)

    Args:
        x: What a block adds, (..., M).
        residual: The residual stream, shaped like x; it may be float32 while x is bfloat16.
        weight: (M,).
        eps: Added to the mean square.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        y in the dtype of x; and the new residual stream in the dtype of the old one. The norm is taken of the sum
        before that is rounded to the residual's dtype.

    Raises:
        ShapeError, DtypeError, ArgumentError: An argument does not fit.
        BackendError: The named backend cannot run this call here.

    Numerics: computed in float32 (float64 if x or residual is).

    Example:
        >>> import torch
        >>> y, residual = add_rms_norm(torch.ones(2), torch.ones(2), torch.ones(2), eps=0.0)
        >>> y, residual
        (tensor([1., 1.]), tensor([2., 2.]))
    """
    _check(x, weight)
    check_shape("residual", residual, x.shape, letters="the shape of x")
    check_float(residual=residual)
    check_device(x, residual=residual)
    dtype = residual.dtype if x.dtype.itemsize < 8 else x.dtype
    run = implementation("add_rms_norm", backend, x.device, dtype)
    y, total = run(x, residual, weight, eps)
    return y, total


def _check(x: Tensor, weight: Tensor) -> None:
    check_shape("weight", weight, x.shape[-1:], letters="(M,)")
    check_float(x=x, weight=weight)
    check_device(x, weight=weight)
