"""Tensors as the arrays that the kernels take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def array(tensor: Tensor | None) -> Any:
    """The same memory as a NumPy array; bfloat16 as uint16, since NumPy has no bfloat16."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def vector(parameter: Tensor | None) -> Any:
    """A parameter as a contiguous array, float32 or complex64."""
    if parameter is None:
        return None
    dtype = torch.complex64 if parameter.is_complex() else torch.float32
    return array(parameter.to(dtype).contiguous())


def readable(tensor: Tensor) -> Tensor:
    """A (B, L, D) tensor with channels that are neighbours in memory, float32 or bfloat16; copied only if need be."""
    if tensor.dtype != torch.bfloat16:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def rows(tensor: Tensor) -> Any:
    """A `readable` tensor as the kernels see it: flat memory, and the strides of batch and time."""
    from mambakit.ops.cpu.kernels.rows import Rows

    sizes_and_strides = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in sizes_and_strides)
    flat = tensor.detach().as_strided((extent if tensor.numel() else 0,), (1,))
    batch_stride, time_stride, _ = tensor.stride()
    return Rows(array(flat), batch_stride, time_stride)
