"""One decoding step of a whole model on a GPU in one kernel, for up to eight rows; see `kernels/decode_model.cu`.

What is too small or too odd for it, and what runs on GPUs before Hopper, is left to the kernels of `model_step`.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.ops.cuda.arrays import TYPES, Variants, has_warpgroups, lanes, multiprocessors
from mambakit.ops.cuda.compiler import kernel
from mambakit.ops.model_layer import Layer

MOST_ROWS = 8
"""Of the batch, which an instruction of the tensor cores multiplies together."""

WARPGROUPS = 3
"""Of a block, of four warps. The last one sends and keeps, and leaves its registers to the others."""

WARPS = 4 * (WARPGROUPS - 1)
"""That multiply. Sixteen meet more slowly, and have no more to do."""

IN_FLIGHT = 43 * 1024
"""Bytes that a block has on their way. With more, what blocks read of one another waits longer; docs/lab-notes.md."""

MOST_PART = 1280
"""Numbers of a row of a matrix in a slot."""

SHARED = 226 * 1024
"""Bytes of shared memory of a block: what Hopper gives but for 1 KB, and so one block a multiprocessor."""

MOST_OWN_ROWS = 64
"""Channels of a block; see MOST_ROWS in kernels/ring_product.cuh."""

MOST_LAYERS = 256
"""Whose addresses fit into the parameters of a kernel, 32 KB."""

GAP = 64
"""Bytes between rows of a slot; see kernels/row_sender.cuh."""


class Shape(NamedTuple):
    """Of all layers of a model."""

    width: int
    """M."""
    channels: int
    """D."""
    rank: int
    """R."""
    states: int
    """N."""
    taps: int
    """W."""

    @property
    def steering(self) -> int:
        """Rows of x_proj."""
        return self.rank + 2 * self.states


class Layout(NamedTuple):
    """How a block's shared memory is divided."""

    part: int
    """Numbers of a row of a matrix in a slot."""
    slots: int
    """Of the ring."""


def plan(shape: Shape, batch: int, blocks: int) -> Layout | None:
    """The layout for so many rows of the batch and blocks; None if the shape has none.

    Neither sums nor their order depend on the batch.
    """
    width, channels, rank, states, taps = shape
    unit, spread = 32 * WARPS, states // 4
    parts = [
        part for part in range(unit, MOST_PART + 1, unit) if width % part == channels % part == 0
    ]
    is_even = rank % 8 == 0 and states % 4 == 0 and spread & (spread - 1) == 0 and taps > 0
    if not parts or not is_even or channels < blocks:
        return None
    own, rows, x_rows = (-(-count // blocks) for count in (channels, width, shape.steering))
    slot = 8 * (2 * parts[-1] + GAP)
    whole = max(x_rows * (2 * channels + GAP), own * (2 * rank + GAP), 2 * width + GAP)
    fits_whole = x_rows <= 8 and whole <= slot
    if not fits_whole or max(own, rows) > MOST_OWN_ROWS or own * spread > unit:
        return None
    tile = _tile(batch)
    work = 4 * tile * (shape.steering + 2 * WARPS * (MOST_OWN_ROWS + 8) + 4 * MOST_OWN_ROWS + WARPS)
    # A slot has two barriers and a count of bytes beside it; 64 bytes are for the keeper's barriers and gaps.
    slots = (SHARED - work - 64) // (slot + 20)
    return Layout(parts[-1], slots) if slots > 2 else None


def suitable(layers: Sequence[Layer], around: Sequence[Tensor], batch: int) -> bool:
    """Whether the kernel does a step of these tensors, which are `model_step.suitable`.

    Args:
        layers: First layer first.
        around: The embedding, (V, M), and the weights of the last norm and the head.
        batch: Rows.
    """
    device, dtype = around[0].device, around[0].dtype
    if (
        batch > MOST_ROWS
        or dtype.itemsize != 2
        or len(layers) > MOST_LAYERS
        or not has_room(device)
    ):
        return False
    first = layers[0]
    shape = shape_of(first)
    if plan(shape, batch, multiprocessors(device)) is None:
        return False
    strides = first.conv_state.stride(), first.ssm_state.stride()
    read_in_sixteens = [*around]
    for layer in layers:
        if (
            shape_of(layer) != shape
            or (layer.conv_state.stride(), layer.ssm_state.stride()) != strides
        ):
            return False
        read_in_sixteens += (
            layer.norm,
            layer.in_proj,
            layer.x_proj,
            layer.dt_proj,
            layer.A_log,
            layer.out_proj,
        )
        if lanes(4, shape.states, layer.ssm_state) < 4:
            return False
    return all(tensor.data_ptr() % 16 == 0 for tensor in read_in_sixteens)


def step(
    tokens: Tensor,
    embedding: Tensor,
    layers: Sequence[Layer],
    norm_f: Tensor,
    head: Tensor,
    eps: Sequence[float],
) -> Tensor:
    """Logits, (B, V); arguments as in `model_step.model_step`."""
    tokens = tokens.contiguous()
    batch, vocab, device = tokens.shape[0], head.shape[0], head.device
    shape, blocks = shape_of(layers[0]), multiprocessors(device)
    layout = plan(shape, batch, blocks)
    assert layout is not None
    logits = head.new_empty(batch, vocab)
    exchanged = _empty(batch, shape, head)
    addresses = [
        tensor.data_ptr() for layer in layers for tensor in layer[:12] if tensor is not None
    ]
    around = tokens, embedding, norm_f, head, logits, *exchanged
    addresses += (tensor.data_ptr() for tensor in around)
    numbers = batch, vocab, *layers[0].conv_state.stride(), *layers[0].ssm_state.stride()[:2]
    parameters = struct.pack(
        f"{len(addresses) + len(numbers)}q{len(eps)}d", *addresses, *numbers, *eps
    )
    token = "int64" if tokens.dtype == torch.int64 else "int"
    constants = _constants(head.dtype, token, len(layers), shape, batch, layout)
    launch = kernel("decode_model.cu", "decode_model", device, **constants)
    launch.with_struct(blocks, 128 * WARPGROUPS, parameters, shared=SHARED, together=True)
    return logits


def _empty(batch: int, shape: Shape, like: Tensor) -> list[Tensor]:
    """What blocks exchange, in the order of the kernel's parameters: all bits are one."""
    halves, words = [2 * batch * shape.channels] * 3, [4 * batch * shape.width] * 2
    sizes = [*words, 4 * batch * shape.steering, *halves, 4]
    memory = torch.full((sum(sizes) // 4,), -1, dtype=torch.int32, device=like.device)
    return list(torch.split(memory, [size // 4 for size in sizes]))


def _constants(
    dtype: torch.dtype, token: str, layers: int, shape: Shape, batch: int, layout: Layout
) -> dict[str, int | str]:
    return {
        "IO": TYPES[dtype],
        "TOKEN": token,
        "LAYERS": layers,
        "WIDTH": shape.width,
        "CHANNELS": shape.channels,
        "RANK": shape.rank,
        "D_STATE": shape.states,
        "TAPS": shape.taps,
        "BATCH": _tile(batch),
        "WARPGROUPS": WARPGROUPS,
        "PART": layout.part,
        "SLOTS": layout.slots,
        "IN_FLIGHT": IN_FLIGHT,
        "SHARED": SHARED,
    }


def _tile(batch: int) -> int:
    """Rows that a block has room for: 1, 2, 4 or 8."""
    return 1 << (batch - 1).bit_length()


def shape_of(layer: Layer) -> Shape:
    """Of one layer."""
    channels, states = layer.A_log.shape
    return Shape(
        layer.norm.shape[0], channels, layer.dt_proj.shape[1], states, layer.conv.shape[-1]
    )


@functools.cache
def has_room(device: torch.device) -> bool:
    """Whether the GPU is one for which the kernel is written, Hopper, with the shared memory that it has."""
    properties: Any = torch.cuda.get_device_properties(device)
    return has_warpgroups(device) and bool(properties.shared_memory_per_block_optin > SHARED)


def variants() -> Variants:
    """The kernels of the released models on 132 multiprocessors, and of an odd one."""
    found: Variants = []
    for width, layers, batch, dtype in (
        (768, 24, 1, torch.bfloat16),
        (1024, 48, 2, torch.float16),
        (1536, 48, 8, torch.bfloat16),
        (2048, 48, 4, torch.bfloat16),
        (2560, 64, 8, torch.float16),
    ):
        shape = Shape(width, 2 * width, width // 16, 16, 4)
        layout = plan(shape, batch, 132)
        assert layout is not None
        constants = _constants(dtype, "int64", layers, shape, batch, layout)
        found.append(("decode_model.cu", "decode_model", constants))
    return found
