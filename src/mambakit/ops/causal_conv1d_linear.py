"""The convolution in front of the scan together with the product behind it, x_proj of the Mamba block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from mambakit.errors import DtypeError
from mambakit.ops import cuda
from mambakit.ops.causal_conv1d import causal_conv1d, check_sequence
from mambakit.ops.checks import check_device, check_rank, check_shape
from mambakit.ops.dispatch import resolve_backend
from mambakit.ops.operators import is_observed


def causal_conv1d_linear(
    x: Tensor,
    weight: Tensor,
    matrix: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve as `causal_conv1d` does, and multiply what comes out of it with a matrix.

        y_t = act(bias + sum_{w < W} weight_w x_{t - (W-1) + w}),   product_t = matrix y_t

    On a Hopper GPU one kernel does both for many time steps in half precision, so that y is written but not read again;
    see `fuses`. Elsewhere they follow one another.

    Args:
        x: Input, (B, L, D), any float dtype.
        weight: Filters, (D, W).
        matrix: (O, D), in the dtype of x.
        bias: Of the convolution, (D,). Default: none.
        activation: None or "silu".
        initial_state: The W - 1 inputs before position 0, (B, D, W-1). Default: zeros.
        seq_idx: Document number of each position, (B, L); see `causal_conv1d`.
        backend: "auto", "cuda", "cpu" or "reference"; see `mambakit.ops.dispatch`.

    Returns:
        y, (B, L, D), and the last W - 1 inputs, (B, D, W-1), as from `causal_conv1d`; and the product, (B, L, O); all
        in the dtype of x. All inputs but seq_idx have gradients.

    Raises:
        ShapeError, DtypeError, ArgumentError: An argument does not fit.
        BackendError: The named backend cannot run this call here.

    Numerics: as `causal_conv1d`; y is rounded to the dtype of x before it is multiplied. Sums of the product in float32
        (float64 for float64 x).

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> weight, matrix = torch.tensor([[10.0, 1.0]]), torch.tensor([[2.0]])
        >>> y, state, product = causal_conv1d_linear(x, weight, matrix)
        >>> y.flatten(), product.flatten()
        (tensor([ 1., 12., 23.]), tensor([ 2., 24., 46.]))
    """
    check_sequence(x, weight, bias, activation, initial_state, seq_idx)
    check_rank("matrix", matrix, 2, "(O, D)")
    check_shape("matrix", matrix, (matrix.shape[0], x.shape[2]), letters="(O, D)")
    check_device(x, matrix=matrix)
    if matrix.dtype != x.dtype:
        raise DtypeError(f"matrix: got dtype {matrix.dtype}, wanted that of x, {x.dtype}")
    chosen = resolve_backend(backend, x.device, x.dtype)
    if chosen == "cuda" and fuses(x, weight, matrix, seq_idx):
        run = cuda.causal_conv1d_linear.causal_conv1d_linear
        y, state, product = run(x, weight, bias, activation, initial_state, matrix)
    else:
        y, state = causal_conv1d(
            x,
            weight,
            bias,
            activation,
            initial_state=initial_state,
            seq_idx=seq_idx,
            backend=chosen,
        )
        product = linear(y, matrix)
    return y, state, product


def fuses(x: Tensor, weight: Tensor, matrix: Tensor, seq_idx: Tensor | None = None) -> bool:
    """Whether one kernel does all that `causal_conv1d_linear` does here, and faster than two.

    It has no gradient: what trains would have to read y again, and is not faster by it.

    Args:
        x: (B, L, D).
        weight: Filters, (D, W).
        matrix: (O, D).
        seq_idx: Document numbers, which it does not take.
    """
    if not x.is_cuda or torch.is_grad_enabled() or seq_idx is not None:
        return False
    if x.dtype != matrix.dtype or is_observed((x, weight, matrix)):
        return False
    found: bool = cuda.causal_conv1d_linear.suitable(x, weight.shape[1], len(matrix))
    return found
