"""The linear layer of a quantised weight."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.errors import BackendError
from mambakit.ops.checks import check_device, check_float, check_shape
from mambakit.ops.dispatch import implementation, resolve_backend
from mambakit.ops.quantisation import QuantisedWeight


def quantised_linear(
    x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Multiply with a matrix of integer codes and scales.

        y = x weight^T + bias

    Args:
        x: Input, (..., K), any float dtype.
        weight: From `mambakit.ops.quantisation.quantise_weight`, of a matrix (O, K).
        bias: (O,). Default: none.
        backend: "auto", "cuda", "cpu" or "reference". The reference is the definition: it makes the
            matrix whole, in the dtype of x, and multiplies. The compiled kernels have no gradient;
            "auto" takes the reference where one is asked for, and in `torch.compile`.

    Returns:
        y, (..., O), in the dtype of x.

    Raises:
        ShapeError, DtypeError, ArgumentError: An argument does not fit.
        BackendError: The named backend cannot run this call here.

    Numerics: cuda has float32 sums. cpu rounds a few rows of x (up to 64) to 16-bit integers, each
    group of `weight.group_size` numbers with a step of its own, max |x| / 32767; sums are integers
    within a group and float32 between groups. So it differs from the reference by at most
    max |x| / 65534 sum |w| for each group, some 2e-5 of y; rounding the weight itself changes 6e-3
    of it with eight bits. A row's result does not depend on the other rows, as long as there are few.

    Example:
        >>> import torch
        >>> from mambakit.ops.quantisation import quantise_weight
        >>> weight = quantise_weight(torch.tensor([[1.0, -2.0]]), bits=8, group_size=64)
        >>> quantised_linear(torch.tensor([[3.0, 1.0]]), weight, backend="reference")
        tensor([[1.]])
    """
    letters = "(..., K) with K of weight"
    check_shape("x", x, (*x.shape[:-1], weight.columns), letters=letters)
    check_shape("bias", bias, (weight.codes.shape[0],), letters="(O,)")
    check_float(x=x, bias=bias)
    check_device(x, codes=weight.codes, scales=weight.scales, bias=bias)
    chosen = resolve_backend(backend, x.device, x.dtype)
    if chosen != "reference" and (reason := _unsuitable(x, bias)):
        if backend != "auto":
            raise BackendError(f"backend {backend!r} cannot run this product: {reason}")
        chosen = "reference"
    run = implementation("quantised_linear", chosen, x.device, x.dtype)
    y: Tensor = run(x, weight, bias)
    return y


def _unsuitable(x: Tensor, bias: Tensor | None) -> str | None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias)):
        return "it has no gradient; call it under torch.no_grad()"
    return "torch.compile cannot look into it" if torch.compiler.is_compiling() else None
