"""A few rows times a matrix on the CPU, where PyTorch reaches a quarter of the memory's speed."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops.cpu.arrays import array, vector
from mambakit.ops.cpu.threads import run

DTYPES = (torch.float32, torch.bfloat16)

SMALL = 2**18
"""A matrix of fewer numbers is multiplied before a second thread would have started."""


def unsuitable(x: Tensor, weight: Tensor) -> str | None:
    """Why PyTorch should compute this product; None if the kernel should."""
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        return f"it is in {x.dtype} and {weight.dtype}; use float32 or bfloat16"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "it has no gradient; call it under torch.no_grad()"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on; switch it off"
    return "torch.compile cannot look into it" if torch.compiler.is_compiling() else None


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Arguments as in `mambakit.ops.linear.linear_step`."""
    from mambakit.ops.cpu.kernels.linear import multiply

    y = x.new_empty(x.shape[0], weight.shape[0])
    arrays = array(x.float().contiguous()), array(weight.contiguous()), vector(bias), array(y)
    if weight.numel() < SMALL:
        multiply(0, weight.shape[0], *arrays)
    else:
        run(multiply, weight.shape[0], *arrays)
    return y
