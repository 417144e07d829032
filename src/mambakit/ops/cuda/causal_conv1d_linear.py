"""The convolution and the product behind it in one pass on Hopper; see `kernels/causal_conv1d_linear.cu`."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from mambakit.ops.cuda.arrays import TYPES, Variants, has_warpgroups, multiprocessors, parameter
from mambakit.ops.cuda.compiler import kernel
from mambakit.ops.cuda.tensor_maps import SWIZZLED, tensor_map

ROWS, BEFORE = 128, 8
"""Time steps of a block, and those from before them that it reads as well: the rows of a swizzle's pattern."""

CONVOLVING = 2
"""Warpgroups of a block that convolve, beside the one that multiplies."""

X_SLOTS, Y_SLOTS = 4, 3
"""Places in shared memory for 64 channels of inputs and outputs."""

REGISTERS, KEPT = 504, 40
"""Of three threads, one of each warpgroup; those of one that multiplies, beside its sums."""

MOST_TAPS, MOST_COLUMNS = 4, 200
"""Taps of a filter and columns of the product for which there are registers."""

ROWS_MEANWHILE = 96
"""Rows that the two kernels do, for each multiprocessor, in the time of a block here."""


def suitable(x: Tensor, width: int, columns: int) -> bool:
    """Whether the kernel takes such an x, and is faster than two.

    Args:
        x: (B, L, D).
        width: Of the filters.
        columns: Of the product.
    """
    return (
        x.dtype.itemsize == 2
        and x.shape[2] % SWIZZLED == 0
        and columns % 2 == 0
        and 2 <= columns <= MOST_COLUMNS
        and 2 <= width <= MOST_TAPS
        and x.stride(2) == 1
        and x.data_ptr() % 16 == x.stride(0) % 8 == x.stride(1) % 8 == 0
        and has_warpgroups(x.device)
        and is_faster(x.shape[0], x.shape[1], multiprocessors(x.device))
    )


def is_faster(batch: int, seqlen: int, processors: int) -> bool:
    """Whether it is, for so many sequences and multiprocessors."""
    turns = -(-_blocks(batch, seqlen) // processors)
    return turns * processors * ROWS_MEANWHILE < batch * seqlen


def causal_conv1d_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    matrix: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as in `mambakit.ops.causal_conv1d_linear`, of which x is `suitable`; without gradient."""
    batch, seqlen, channels = x.shape
    width, columns = weight.shape[1], len(matrix)
    if bias is not None and bias.dtype != weight.dtype:
        weight, bias = weight.float(), bias.float()
    weight, matrix = _copyable(weight), _copyable(matrix)
    bias = None if bias is None else _copyable(bias)
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    state = x.new_empty(batch, channels, width - 1)
    product = x.new_empty(batch, seqlen, columns)
    maps = (
        tensor_map(x, 1, BEFORE, SWIZZLED),
        tensor_map(x, 1, ROWS, SWIZZLED),
        tensor_map(y, 1, ROWS, SWIZZLED),
        tensor_map(matrix, _padded(columns), SWIZZLED),
    )
    strides = (0, 0, 0) if initial_state is None else initial_state.stride()
    parameters = b"".join(maps) + struct.pack(
        "10q", weight.data_ptr(), _address(bias), _address(initial_state), *strides, state.data_ptr(),
        product.data_ptr(), seqlen, channels,
    )  # fmt: skip
    parameters += bytes(-len(parameters) % 64)  # As the struct has, whose maps begin at 64 bytes.
    constants = _constants(x.dtype, weight.dtype, width, activation == "silu", columns)
    launch = kernel("causal_conv1d_linear.cu", "causal_conv1d_linear", x.device, **constants)
    launch.with_struct(
        _blocks(batch, seqlen),
        128 * (CONVOLVING + 1),
        parameters,
        shared=shared_memory(width, columns, weight.element_size()),
    )
    return y, state, product


def registers(columns: int) -> tuple[int, int]:
    """Of a thread that multiplies for so many columns, and of one that convolves."""
    sums = ROWS * _padded(columns) // 128
    multiplying = max(REGISTERS // (CONVOLVING + 1), sums + KEPT)
    return multiplying, (REGISTERS - multiplying) // CONVOLVING // 8 * 8


def shared_memory(width: int, columns: int, parameter_bytes: int) -> int:
    """Bytes of shared memory of a block."""
    x_slot = 128 * (BEFORE + ROWS) + SWIZZLED * (width + 1) * parameter_bytes
    x_slots = X_SLOTS * -(-x_slot // 1024) * 1024
    matrix_slots = _matrix_slots(columns)
    barriers = 8 * (X_SLOTS + 2 * Y_SLOTS + matrix_slots)
    return x_slots + Y_SLOTS * 128 * ROWS + matrix_slots * 128 * _padded(columns) + barriers


def _matrix_slots(columns: int) -> int:
    """Places in shared memory for 64 columns of the matrix."""
    return 3 if columns <= 160 else 2


def _blocks(batch: int, seqlen: int) -> int:
    return batch * -(-seqlen // ROWS)


def _padded(columns: int) -> int:
    """Columns as an instruction multiplies them."""
    return -(-columns // 8) * 8


def _copyable(tensor: Tensor) -> Tensor:
    """It as copies to shared memory take it: contiguous, from 16 bytes on."""
    found = parameter(tensor)
    assert found is not None
    return found if found.data_ptr() % 16 == 0 else found.clone()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _constants(
    io: torch.dtype, parameters: torch.dtype, width: int, silu: bool, columns: int
) -> dict[str, int | str]:
    multiplying, convolving = registers(columns)
    return {
        "IO": TYPES[io],
        "PARAMETER": TYPES[parameters],
        "WIDTH": width,
        "SILU": int(silu),
        "COLUMNS": columns,
        "ROWS": ROWS,
        "CONVOLVING": CONVOLVING,
        "X_SLOTS": X_SLOTS,
        "Y_SLOTS": Y_SLOTS,
        "P_SLOTS": _matrix_slots(columns),
        "REGISTERS": multiplying,
        "CONVOLVING_REGISTERS": convolving,
        "WARPGROUPS": 1,
    }


def variants() -> Variants:
    """The kernels of the sizes of some released models, and of others."""
    return [
        (
            "causal_conv1d_linear.cu",
            "causal_conv1d_linear",
            _constants(dtype, parameters, width, True, columns),
        )
        for dtype, parameters, width, columns in (
            (torch.bfloat16, torch.bfloat16, 4, 160),
            (torch.bfloat16, torch.float32, 4, 192),
            (torch.float16, torch.float16, 4, 80),
            (torch.bfloat16, torch.float32, 3, 22),
            (torch.float16, torch.float32, 2, MOST_COLUMNS),
        )
    ]
