"""`mamba_ssm.ops.triton.layer_norm`: norms fused with the addition to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, layer_norm, linear

from mambakit.errors import ArgumentError
from mambakit.ops import add_rms_norm, rms_norm


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Add to the residual stream and normalise the sum.

        residual' = dropout(rowscale x) + dropout(x1) + residual        y = norm(residual') weight + bias

    Args:
        x: (..., M).
        weight: (M,).
        bias: (M,).
        residual: The residual stream, (..., M).
        x1: Added as well, like x.
        weight1: Weight of a second output of the same norm, (M,).
        bias1: Its bias.
        eps: Added to the mean square, or variance.
        dropout_p: Probability that a number of x (and of x1) is zero; the others are scaled up.
        rowscale: Factor of each row of x, (...).
        prenorm: Whether to return the residual stream too.
        residual_in_fp32: Whether that is float32 where there is no `residual`, whose dtype it has else.
        is_rms_norm: RMS norm; layer norm if not.
        return_dropout_mask: Whether to return which numbers of x and x1 are kept (None: all).

    Returns:
        y; the second output, if there is `weight1`; the residual stream, if `prenorm`; the two masks,
        if asked for. y has the dtype of x.
    """
    if x1 is not None and rowscale is not None:
        raise ArgumentError(
            "rowscale: got one together with x1, wanted one of them; scale x yourself"
        )
    total = x if rowscale is None else x * rowscale[..., None]
    total, mask = _dropped(total, dropout_p)
    mask1 = None
    if x1 is not None:
        x1, mask1 = _dropped(x1, dropout_p)
        total = total + x1
    wide = torch.promote_types(x.dtype, torch.float32) if residual_in_fp32 else x.dtype
    if residual is None:
        stream, y = total.to(wide), _norm(total, weight, bias, eps, is_rms_norm)
    elif is_rms_norm and bias is None:
        y, stream = add_rms_norm(total, residual, weight, eps)
    else:
        stream = total + residual
        y = _norm(stream, weight, bias, eps, is_rms_norm)
        stream = stream.to(residual.dtype)
    outputs: list[Any] = [y.to(x.dtype)]
    if weight1 is not None:
        outputs.append(_norm(stream, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    outputs += [stream] if prenorm else []
    outputs += [mask, mask1] if return_dropout_mask else []
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """`layer_norm_fn` with RMS norm."""
    added = residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32
    return layer_norm_fn(x, weight, bias, *added, True, return_dropout_mask)


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """`layer_norm_fn` and a matrix product after it; returns the residual stream too, if `prenorm`."""
    y, stream = layer_norm_fn(
        x, norm_weight, norm_bias, residual, eps=eps, prenorm=True,
        residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm,
    )  # fmt: skip
    if linear_bias is not None:
        linear_bias = linear_bias.to(linear_weight.dtype)
    out = linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, stream) if prenorm else out


class RMSNorm(nn.Module):
    """RMS norm, with the residual stream if that is given.

    Args:
        hidden_size: M.
        eps: Added to the mean square.
        dropout_p: Of x, in training.
        device: Of the weight.
        dtype: Of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """Arguments and outputs as of `layer_norm_fn`."""
        dropout_p = self.drop.p if self.drop is not None and self.training else 0.0
        return rms_norm_fn(
            x, self.weight, None, residual, eps=self.eps, dropout_p=dropout_p, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )  # fmt: skip


def _dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """x with numbers dropped, and which are kept."""
    if p == 0:
        return x, None
    scale = dropout(torch.ones_like(x), p)
    return x * scale, scale > 0


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    """In the dtype of x."""
    if is_rms_norm:
        y = rms_norm(x, weight, eps)
        return y if bias is None else y + bias
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    return layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias, eps).to(x.dtype)
