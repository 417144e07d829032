"""Tensors as the kernels take them: which type of C, how many neighbouring numbers in one access."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""The type in `kernels/numbers.cuh` of each dtype."""

Variants = list[tuple[str, str, dict[str, int | str]]]
"""Kernels as a file, a function in it and its constants; what the tests compile."""


def readable(tensor: Tensor) -> Tensor:
    """A tensor whose last dimension is contiguous; copied only if need be."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def parameter(tensor: Tensor | None) -> Tensor | None:
    """A parameter, contiguous, in a dtype that the kernels know."""
    if tensor is None:
        return None
    return (tensor if tensor.dtype in TYPES else tensor.float()).contiguous()


def lanes(most: int, size: int, *tensors: Tensor | None) -> int:
    """How many neighbouring numbers one access may move: a power of two.

    Args:
        most: At most so many.
        size: Of the last dimension, which they divide.
        tensors: They divide the other strides and the address of each.
    """
    bits = most | size
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr() // tensor.element_size()
            for extent, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
                bits |= stride if extent > 1 else 0
    return bits & -bits


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the GPU has."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a multiprocessor has."""
    size: int = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return size


@functools.cache
def has_warpgroups(device: torch.device) -> bool:
    """Whether four warps of the GPU can multiply together (wgmma): compute capability 9.0 alone."""
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def has_clusters(device: torch.device) -> bool:
    """Whether blocks of the GPU can read one another's shared memory."""
    return torch.cuda.get_device_capability(device) >= (9, 0)
