"""A linear layer of a quantised weight on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from mambakit.ops.cpu.arrays import array, vector
from mambakit.ops.cpu.linear import SMALL
from mambakit.ops.cpu.threads import run
from mambakit.ops.quantisation import QuantisedWeight

FEW = 64
"""Up to so many rows integer products are faster; above, a float32 product of the matrix made whole."""


def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """Arguments as in `mambakit.ops.quantised_linear.quantised_linear`."""
    rows, shape = x.reshape(-1, weight.columns), (*x.shape[:-1], weight.codes.shape[0])
    if rows.shape[0] > FEW:
        # In float32 for bfloat16 too, which not every CPU multiplies.
        wide = linear(rows.float(), _dequantise(weight), _wide(bias))
        return wide.to(x.dtype).view(shape)
    return _few_rows(rows, weight, bias).view(shape)


def _few_rows(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    from mambakit.ops.cpu.kernels.quantised_linear import multiply, round_rows

    outputs, groups = weight.scales.shape
    dtype, x = x.dtype, x if x.dtype == torch.bfloat16 else x.float()
    codes = np.empty((x.shape[0], weight.padded_columns), np.int16)
    steps = np.empty((x.shape[0], groups), np.float32)
    round_rows(0, x.shape[0], array(x.contiguous()), codes, steps)
    y = x.new_empty(x.shape[0], outputs)
    matrix = array(weight.codes.contiguous()), array(weight.scales.contiguous())
    if weight.codes.numel() < SMALL:
        multiply(0, outputs, codes, steps, *matrix, vector(bias), array(y))
    else:
        run(multiply, outputs, codes, steps, *matrix, vector(bias), array(y))
    return y.to(dtype)


def _dequantise(weight: QuantisedWeight) -> Tensor:
    """The matrix in float32, (O, K)."""
    from mambakit.ops.cpu.kernels.quantised_linear import dequantise

    whole = torch.empty(weight.codes.shape[0], weight.columns)
    matrix = array(weight.codes.contiguous()), array(weight.scales.contiguous())
    run(dequantise, weight.codes.shape[0], *matrix, array(whole))
    return whole


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
