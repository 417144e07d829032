"""The convolution and the product behind it in one pass on Hopper; see `kernels/causal_conv1d_linear.cu`."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from mambakit.ops.cuda.arrays import TYPES, Variants, has_warpgroups, multiprocessors, parameter
from mambakit.ops.cuda.causal_conv1d import causal_conv1d, gradients
from mambakit.ops.cuda.compiler import kernel
from mambakit.ops.cuda.tensor_maps import SWIZZLED, tensor_map
from mambakit.ops.operators import Operator

CONVOLVING = 2
"""Warpgroups of a block that convolve, beside the one that multiplies."""

REGISTERS, KEPT, MOST_REGISTERS = 504, 40, 240
"""Of a thread of each of the three together; those that one which multiplies has beside its sums, and all of it."""

BEFORE = 8
"""Time steps from before its own that a block reads: the rows of a swizzle's pattern."""

MOST_TAPS, MOST_COLUMNS = 4, 256
"""Taps of a filter, whose registers there are; columns of the product, the rows of a box."""

WORTH = {2: 96, 1: 60}
"""Rows that the separate kernels do in the time of a block of so many tiles, for each of the multiprocessors."""


class Layout(NamedTuple):
    """What a block does, and how its shared memory is divided."""

    tiles: int
    """Of 64 time steps."""
    x_slots: int
    """Places for inputs, 64 channels each."""
    y_slots: int
    """For outputs."""
    p_slots: int
    """For parts of the matrix."""

    @property
    def rows(self) -> int:
        """Time steps of a block."""
        return 64 * self.tiles

    def registers(self, columns: int) -> tuple[int, int]:
        """Of a thread that multiplies by a matrix of so many rows, and of one that convolves."""
        each = REGISTERS // (CONVOLVING + 1)
        own = max(each, _registers(self.tiles, columns))
        return own, (REGISTERS - own) // CONVOLVING // 8 * 8

    def shared_memory(self, width: int, columns: int, parameter_bytes: int) -> int:
        """Bytes of shared memory of a block."""
        x_slot = 128 * (BEFORE + self.rows) + SWIZZLED * (width + 1) * parameter_bytes
        x_slot = -(-x_slot // 1024) * 1024
        # And the barriers: one for each slot, but two for y.
        return (
            self.x_slots * (x_slot + 8)
            + self.y_slots * (128 * self.rows + 16)
            + self.p_slots * (128 * _padded(columns) + 8)
        )


def plan(batch: int, seqlen: int, columns: int, multiprocessors: int) -> Layout | None:
    """The layout for so many sequences and rows of the matrix; None if the separate kernels are faster."""
    found = []
    for tiles, worth in WORTH.items():
        if _registers(tiles, columns) <= MOST_REGISTERS:
            blocks = batch * -(-seqlen // (64 * tiles))
            found.append((-(-blocks // multiprocessors) * worth, tiles))
    cost, tiles = min(found, default=(batch * seqlen, 0))
    if cost * multiprocessors >= batch * seqlen:
        return None
    return Layout(tiles, 4, 3, 3) if columns <= 160 or tiles == 1 else Layout(tiles, 4, 3, 2)


def suitable(x: Tensor, width: int, columns: int) -> bool:
    """Whether the kernel takes such an x, and is faster than two.

    Args:
        x: (B, L, D).
        width: Of the filters.
        columns: Of the product.
    """
    batch, seqlen, channels = x.shape
    return (
        x.dtype.itemsize == 2
        and channels % SWIZZLED == 0
        and columns % 2 == 0
        and 2 <= columns <= MOST_COLUMNS
        and 2 <= width <= MOST_TAPS
        and x.stride(2) == 1
        and x.data_ptr() % 16 == x.stride(0) % 8 == x.stride(1) % 8 == 0
        and has_warpgroups(x.device)
        and plan(batch, seqlen, columns, multiprocessors(x.device)) is not None
    )


def causal_conv1d_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    matrix: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as in `mambakit.ops.causal_conv1d_linear`, which are `suitable`."""
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)
    y, state, product = _forward(x, weight, bias, initial_state, matrix, activation == "silu")
    return y, state, product


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    matrix: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seqlen, channels = x.shape
    width, columns = weight.shape[1], matrix.shape[0]
    layout = plan(batch, seqlen, columns, multiprocessors(x.device))
    assert layout is not None
    if bias is not None and bias.dtype != weight.dtype:
        weight, bias = weight.float(), bias.float()
    filters, bias, matrix = (_copyable(tensor) for tensor in (weight, bias, matrix))
    y, state, product = _empty(x, filters, bias, initial_state, matrix, silu)
    maps = (
        tensor_map(x, 1, BEFORE, SWIZZLED),
        tensor_map(x, 1, layout.rows, SWIZZLED),
        tensor_map(y, 1, layout.rows, SWIZZLED),
        tensor_map(matrix, _padded(columns), SWIZZLED),
    )
    strides = (0, 0, 0) if initial_state is None else initial_state.stride()
    parameters = b"".join(maps) + struct.pack(
        "10q", filters.data_ptr(), _address(bias), _address(initial_state), *strides, state.data_ptr(),
        product.data_ptr(), seqlen, channels,
    )  # fmt: skip
    constants = _constants(x.dtype, filters.dtype, width, silu, columns, layout)
    launch = kernel("causal_conv1d_linear.cu", "causal_conv1d_linear", x.device, **constants)
    launch.with_struct(
        batch * -(-seqlen // layout.rows),
        128 * (CONVOLVING + 1),
        parameters + bytes(-len(parameters) % 64),  # as the struct has, whose maps begin at 64 bytes
        shared=layout.shared_memory(width, columns, filters.element_size()),
    )
    return y, state, product


def _empty(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    matrix: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for y, the final state and the product."""
    batch, seqlen, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    state = x.new_empty(batch, channels, weight.shape[1] - 1)
    return y, state, x.new_empty(batch, seqlen, matrix.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dy: Tensor | None, dstate: Tensor | None, dproduct: Tensor | None
) -> tuple[Any, ...]:
    x, weight, bias, initial_state, matrix = ctx.saved_tensors
    dmatrix = None
    if dproduct is not None:
        y, _ = causal_conv1d(x, weight, bias, "silu" if ctx.silu else None, initial_state, None)
        rows = dproduct.reshape(-1, len(matrix))
        dmatrix = rows.t() @ y.view(len(rows), -1)
        of_y = (rows @ matrix).view_as(y)
        dy = of_y if dy is None else dy + of_y
    of_inputs = gradients(ctx, (x, weight, bias, initial_state, None), dy, dstate)
    return (*of_inputs, dmatrix, None)


_forward = Operator(
    "cuda_causal_conv1d_linear", "cuda", _run, fake=_empty, setup=_setup, gradients=_gradients
)


def _registers(tiles: int, columns: int) -> int:
    """That a thread needs to multiply: a tile has 64 sums of each column for 128 threads."""
    return tiles * _padded(columns) // 2 + KEPT


def _padded(columns: int) -> int:
    """Columns as an instruction multiplies them."""
    return -(-columns // 8) * 8


def _copyable(tensor: Tensor | None) -> Tensor | None:
    """It as copies to shared memory take it: contiguous, from 16 bytes on."""
    found = parameter(tensor)
    return found if found is None or found.data_ptr() % 16 == 0 else found.clone()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _constants(
    io: torch.dtype,
    parameters: torch.dtype,
    width: int,
    silu: bool,
    columns: int,
    layout: Layout,
) -> dict[str, int | str]:
    registers, of_convolving = layout.registers(columns)
    return {
        "IO": TYPES[io],
        "PARAMETER": TYPES[parameters],
        "WIDTH": width,
        "SILU": int(silu),
        "COLUMNS": columns,
        "TILES": layout.tiles,
        "CONVOLVING": CONVOLVING,
        "X_SLOTS": layout.x_slots,
        "Y_SLOTS": layout.y_slots,
        "P_SLOTS": layout.p_slots,
        "REGISTERS": registers,
        "CONVOLVING_REGISTERS": of_convolving,
        "WARPGROUPS": 1,
    }


def variants() -> Variants:
    """The kernels of the released models' sizes, and of both numbers of tiles."""
    found: Variants = []
    for dtype, parameters, width, columns, tiles in (
        (torch.bfloat16, torch.bfloat16, 4, 160, 2),
        (torch.bfloat16, torch.float32, 4, 192, 2),
        (torch.float16, torch.float16, 4, 80, 2),
        (torch.bfloat16, torch.float32, 3, 160, 1),
        (torch.float16, torch.float32, 2, 256, 1),
    ):
        layout = plan(132, 64 * tiles * 8, columns, 132)
        assert layout is not None
        constants = _constants(dtype, parameters, width, True, columns, layout)
        found.append(("causal_conv1d_linear.cu", "causal_conv1d_linear", constants))
    return found
