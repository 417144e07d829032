"""How tensors lie in memory, as the copies of boxes on Hopper want to know it (`TensorMap` in the kernels)."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

SWIZZLED = 64
"""Numbers of two bytes in a row of a box whose order is a swizzle's: 128 bytes."""


def tensor_map(tensor: Tensor, *box: int, swizzled: bool = True) -> bytes:
    """The map of a tensor of half precision, for copies of boxes.

    What is outside of the tensor is zeros, and is not written.

    Args:
        tensor: From 16 bytes on, with a contiguous last dimension; other strides are multiples of 16 bytes.
        box: Its shape, by dimensions as the tensor has; at most 256 each.
        swizzled: Whether its rows of `SWIZZLED` numbers are in the order of a swizzle of 128 bytes.
    """
    return _tensor_map(
        tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), box, swizzled, tensor.dtype
    )


@functools.lru_cache(maxsize=4096)
def _tensor_map(
    address: int,
    shape: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzled: bool,
    dtype: torch.dtype,
) -> bytes:
    from cuda.bindings import driver

    kinds, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    status, found = driver.cuTensorMapEncodeTiled(
        kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if dtype is torch.bfloat16 else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        len(shape), address,
        [driver.cuuint64_t(size) for size in reversed(shape)],
        [driver.cuuint64_t(2 * stride) for stride in reversed(strides[:-1])],
        [driver.cuuint32_t(size) for size in reversed(box)], [driver.cuuint32_t(1)] * len(shape),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzles.CU_TENSOR_MAP_SWIZZLE_128B if swizzled else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    assert int(status) == 0, status
    return struct.pack("16Q", *map(int, found.opaque))
