"""A linear layer of a quantised weight on a GPU: `kernels/quantised_linear_step.cu` and `kernels/dequantise.cu`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from mambakit.ops.cuda.arrays import TYPES, Variants, lanes, multiprocessors, readable
from mambakit.ops.cuda.compiler import kernel
from mambakit.ops.quantisation import QuantisedWeight

FEW = 8
"""Up to so many rows the codes are multiplied as they are; above, the matrix is made whole for PyTorch's product."""
WARPS = 4
"""Of a block; see the kernel."""
THREADS = 256
"""Of a block of `dequantise`."""


def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """Arguments as in `mambakit.ops.quantised_linear.quantised_linear`."""
    rows = x.reshape(-1, weight.columns)
    if rows.shape[0] > FEW:
        y = linear(rows, _dequantise(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    else:
        y = _few_rows(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.codes.shape[0])


def _few_rows(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    rows, outputs = x.shape[0], weight.codes.shape[0]
    y = x.new_empty(rows, outputs)
    if not y.numel():
        return y
    x = readable(x)
    if lanes(8, x.shape[1], x) < 8:  # of any size and place: a copy that is padded
        x = pad(x, (0, -x.shape[1] % 8)).contiguous()
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
    each = outputs_of_warp(outputs, multiprocessors(x.device))
    launch = kernel(
        "quantised_linear_step.cu", "quantised_linear_step", x.device, X=TYPES[x.dtype],
        OUTPUTS=each, ROWS=1 << (rows - 1).bit_length(), **_constants(weight),
    )  # fmt: skip
    launch(
        -(-outputs // (WARPS * each)), 32 * WARPS, x, x.stride(0), codes, _pieces(weight), scales, scales.shape[1],
        None if bias is None else bias.float().contiguous(), y, rows, outputs, x.shape[1],
    )  # fmt: skip
    return y


def _dequantise(weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix, (O, K)."""
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
    whole = torch.empty(codes.shape[0], weight.columns, dtype=dtype, device=codes.device)
    blocks = min(
        -(-codes.shape[0] * _pieces(weight) // THREADS), 16 * multiprocessors(codes.device)
    )
    launch = kernel(
        "dequantise.cu", "dequantise", codes.device, X=TYPES[dtype],
        WHOLE=int(weight.columns % 8 == 0), **_constants(weight),
    )  # fmt: skip
    launch(
        blocks, THREADS, codes, _pieces(weight), scales, scales.shape[1], whole, codes.shape[0], weight.columns,
    )  # fmt: skip
    return whole


def outputs_of_warp(outputs: int, processors: int) -> int:
    """How many outputs a warp computes: each makes use of the numbers of x, but there have to be enough warps."""
    return next((each for each in (4, 2) if outputs // each >= 16 * processors), 1)


def _pieces(weight: QuantisedWeight) -> int:
    """Sixteen bytes of codes, in a row."""
    return weight.codes.shape[1] * weight.codes.element_size() // 16


def _constants(weight: QuantisedWeight) -> dict[str, int | str]:
    return {"BITS": weight.bits, "GROUP": weight.group_size}


def variants() -> Variants:
    """The kernels of the usual dtypes, batches and groups."""
    found: Variants = []
    for io, bits, group, outputs, rows, whole in (
        ("bfloat16", 8, 64, 4, 1, 1),
        ("bfloat16", 4, 64, 4, 1, 1),
        ("float16", 8, 128, 2, 2, 0),
        ("bfloat16", 4, 32, 1, 8, 1),
        ("float", 8, 32, 1, 4, 1),
        ("float", 4, 64, 4, 8, 0),
        ("bfloat16", 8, 64, 4, 8, 1),
    ):
        constants: dict[str, int | str] = {"X": io, "BITS": bits, "GROUP": group}
        step = {**constants, "OUTPUTS": outputs, "ROWS": rows}
        found.append(("quantised_linear_step.cu", "quantised_linear_step", step))
        found.append(("dequantise.cu", "dequantise", {**constants, "WHOLE": whole}))
    return found
