"""The matrix product of a decoding step: many weights, few rows."""

from __future__ import annotations

from torch import Tensor

from mambakit.errors import BackendError
from mambakit.ops.checks import check_device, check_float, check_rank, check_shape
from mambakit.ops.cpu import linear as cpu
from mambakit.ops.dispatch import resolve_backend
from mambakit.ops.reference import linear as reference


def linear_step(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Multiply a few rows with a matrix, in the time that it takes to read the matrix.

        y = x weight^T + bias

    Args:
        x: Input, (B, K), any float dtype.
        weight: (O, K), in the dtype of x.
        bias: (O,), in the dtype of x. Default: none.
        backend: "auto", "cuda", "cpu" or "reference". "auto" takes the compiled kernel where it is
            faster than PyTorch: on the CPU, in float32 and bfloat16; not within autocast and
            `torch.compile`, and not where a gradient is asked for, of which it has none. On a GPU
            the product is PyTorch's (cuBLAS), with "cuda" too.

    Returns:
        y, (B, O), in the dtype of x.

    Raises:
        ShapeError, DtypeError, ArgumentError: An argument does not fit.
        BackendError: The named backend cannot run this call here.

    Numerics: float32 sums. With the cpu backend, a row's result does not depend on the other rows.

    Example:
        >>> import torch
        >>> linear_step(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.]])
    """
    check_rank("x", x, 2, "(B, K)")
    check_rank("weight", weight, 2, "(O, K)")
    check_shape("x", x, (x.shape[0], weight.shape[1]), letters="(B, K) with K of weight")
    check_shape("bias", bias, (weight.shape[0],), letters="(O,)")
    check_float(x=x, weight=weight, bias=bias)
    check_device(x, weight=weight, bias=bias)
    chosen = resolve_backend(backend, x.device, x.dtype)
    reason = cpu.unsuitable(x, weight) if chosen == "cpu" else None
    if backend == "cpu" and reason is not None:
        raise BackendError(f"backend 'cpu' cannot run this product: {reason}")
    run = cpu.linear_step if chosen == "cpu" and reason is None else reference.linear_step
    return run(x, weight, bias)
