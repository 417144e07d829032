"""The short causal depthwise convolution in front of the scan: over a whole sequence, and one step of it."""

from __future__ import annotations

from torch import Tensor

from mambakit.errors import ArgumentError
from mambakit.ops.checks import (
    check_device,
    check_float,
    check_in_place,
    check_integer,
    check_rank,
    check_shape,
)
from mambakit.ops.dispatch import implementation


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve every channel with its own short filter over the present and the past.

        y_t = act(bias + sum_{w < W} weight_w x_{t - (W-1) + w})

    Args:
        x: Input, (B, L, D), any float dtype.
        weight: Filters, (D, W); weight[:, W-1] meets the present.
        bias: (D,). Default: none.
        activation: None or "silu".
        initial_state: The W - 1 inputs before position 0, oldest first, (B, D, W-1). Default: zeros.
        seq_idx: Document number of each position, (B, L), int32 or int64. Inputs of earlier documents count as zero;
            `initial_state` belongs to the document of position 0.
        backend: "auto", "cuda", "cpu" or "reference"; see `mambakit.ops.dispatch`.

    Returns:
        y, (B, L, D), and the last W - 1 inputs, (B, D, W-1), zero where they belong to an earlier document than the
        last; both in the dtype of x. All inputs but seq_idx have gradients, through both outputs.

    Raises:
        ShapeError, DtypeError, ArgumentError: An argument does not fit.
        BackendError: The named backend cannot run this call here.

    Numerics: sums in float32 (float64 for float64 x).
    Source: the convolution of the Mamba block (Gu & Dao 2023, section 3.4), W = 4 there.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> y, state = causal_conv1d(x, weight=torch.tensor([[10.0, 1.0]]))
        >>> y.flatten(), state.flatten()
        (tensor([ 1., 12., 23.]), tensor([3.]))
    """
    check_sequence(x, weight, bias, activation, initial_state, seq_idx)
    run = implementation("causal_conv1d", backend, x.device, x.dtype)
    y, state = run(x, weight, bias, activation, initial_state, seq_idx)
    return y, state


def causal_conv1d_step(
    conv_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Advance the convolution of `causal_conv1d` by one step, in place.

    Args:
        conv_state: The last W - 1 inputs, oldest first, (B, D, W-1), in the dtype of x. Updated in place.
        x: Input, (B, D).
        weight: Filters, (D, W).
        bias: (D,). Default: none.
        activation: None or "silu".
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        y, (B, D), in the dtype of x.

    Raises:
        ShapeError, DtypeError: An argument does not fit.
        ArgumentError: A gradient was asked for; an in-place step has none.
        BackendError: The named backend cannot run this call here.

    Example:
        >>> import torch
        >>> state = torch.tensor([[[2.0]]])
        >>> causal_conv1d_step(state, torch.tensor([[3.0]]), torch.tensor([[10.0, 1.0]]))
        tensor([[23.]])
        >>> state.item()
        3.0
    """
    check_rank("x", x, 2, "(B, D)")
    batch, channels = x.shape
    width = _check_filter(x, weight, bias, activation)
    check_shape("conv_state", conv_state, (batch, channels, width - 1), letters="(B, D, W-1)")
    check_device(x, conv_state=conv_state)
    check_in_place("conv_state", conv_state, x.dtype, x, weight, bias)
    run = implementation("causal_conv1d_step", backend, x.device, x.dtype)
    y: Tensor = run(conv_state, x, weight, bias, activation)
    return y


def check_sequence(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """Check the arguments of `causal_conv1d`."""
    check_rank("x", x, 3, "(B, L, D)")
    batch, seqlen, channels = x.shape
    width = _check_filter(x, weight, bias, activation)
    state_shape = (batch, channels, width - 1)
    check_shape("initial_state", initial_state, state_shape, letters="(B, D, W-1)")
    check_shape("seq_idx", seq_idx, (batch, seqlen), letters="(B, L)")
    check_float(initial_state=initial_state)
    check_integer(seq_idx=seq_idx)
    check_device(x, initial_state=initial_state, seq_idx=seq_idx)


def _check_filter(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> int:
    """Check what sequence and step have in common; return the filter width W."""
    channels = x.shape[-1]
    check_rank("weight", weight, 2, "(D, W)")
    width = weight.shape[1]
    check_shape("weight", weight, (channels, max(width, 1)), letters="(D, W)")
    check_shape("bias", bias, (channels,), letters="(D,)")
    check_float(x=x, weight=weight, bias=bias)
    check_device(x, weight=weight, bias=bias)
    if activation not in (None, "silu"):
        raise ArgumentError(f"activation: got {activation!r}, wanted None or 'silu'")
    return width
