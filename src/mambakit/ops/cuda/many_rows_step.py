"""One decoding step of a whole model on a GPU in one kernel, for 9 to 128 rows; see `kernels/decode_rows.cu`.

Fewer rows are left to `one_kernel_step`, what is too odd for it and GPUs that are not Hopper to the kernels of
`model_step`.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.ops.cuda.arrays import TYPES, Variants
from mambakit.ops.cuda.compiler import kernel
from mambakit.ops.cuda.one_kernel_step import SHARED, Shape, has_room, shape_of
from mambakit.ops.cuda.tensor_maps import SWIZZLED, tensor_map
from mambakit.ops.deferred_states import DeferredStates
from mambakit.ops.model_layer import Layer

FEWEST_ROWS, MOST_ROWS = 9, 128
"""Of the batch."""

LEAST_WIDTH = 768
"""Of the stream, for which the step is faster than by the kernels of `model_step` (docs/lab-notes.md)."""

MOST_LAYERS = 69
"""Whose addresses and tensor maps fit into the parameters of a kernel, 32 KB."""

LEAST_WIDTH_TO_DEFER, FEWEST_ROWS_TO_DEFER = 1536, 33
"""From which on a step that defers states is faster (docs/lab-notes.md)."""

CLUSTER = 4
"""Blocks of a cluster, each of which has a quarter of k."""

MOST_CLUSTERS = 32
"""As many as a warp has lanes, which look for one each."""

THREADS = 384
"""Of a block: two warpgroups that multiply, one that sends."""

IN_FLIGHT, IN_FLIGHT_OF_MANY = 2, 3
"""Slots of weights, as full ones, that a block has on their way (as in `one_kernel_step`); and for more than 64 rows,
whose scan waits for nothing but memory: on an H200 2 % faster, on an H100 as fast."""

ENOUGH_SLOTS = 7
"""Of the ring of weights. With fewer, and at 64 rows, x has three slots instead of four (docs/lab-notes.md)."""

MOST_SLOTS = 32
"""Of the ring; more would not be used."""

MOST_OWN = 176
"""Channels of a cluster; see kernels/warpgroup_sums.cuh."""

UNIT = 16
"""Channels that a cluster has at least, and multiples of which it has."""


class Layout(NamedTuple):
    """How a block's shared memory is divided."""

    slots: int
    """Of the ring of weights and states."""
    x_slots: int
    """Of the ring of x."""


def plan(shape: Shape, batch: int, clusters: int) -> Layout | None:
    """The layout for so many rows of the batch and clusters; None if the shape has none.

    Neither sums nor their order depend on the batch.
    """
    width, channels, rank, states, taps = shape
    is_even = width % 256 == 0 and channels == 2 * width and rank % 16 == 0
    if not is_even or states != 16 or not 2 <= taps <= 4 or channels // UNIT < clusters:
        return None
    tile = tile_of(batch)
    own, share, tiles = _own(shape, clusters), tile // CLUSTER, -(-tile // 64)
    slot, x_slot = 128 * own, 128 * tile
    if own > MOST_OWN or rank * 2 + 16 > slot // 8:  # Eight rows of dt_proj do not fit into a slot.
        return None
    sums = max(CLUSTER * _pitch(own // tiles), CLUSTER * (3 - tiles) * _pitch(own // 2))
    rows = max(16, share)
    steering = share * (8 * states + 2 * (own + 2)) + 2 * rows * (rank + 8)  # B and C, dt; its rank
    steering += share * (4 * own + 2 * states)  # dt, x and B of the step before
    used = (
        max(4 * share * sums, steering)
        + 2 * (rows + share) * (own + 8)  # x, z
        + 4 * (2 * tile + 2 * share + own)  # Scales, turns, biases
        + 512
    )

    def slots_beside(x_slots: int) -> int:
        return min((SHARED - used - x_slots * (x_slot + 4)) // (slot + 20), MOST_SLOTS)

    x_slots = 3 if tile == 64 or slots_beside(4) < ENOUGH_SLOTS else 4
    slots = slots_beside(x_slots)
    return Layout(slots, x_slots) if slots >= 2 else None


def suitable(layers: Sequence[Layer], around: Sequence[Tensor], batch: int) -> bool:
    """Whether the kernel does a step of these tensors, which are `model_step.suitable`.

    Args:
        layers: First layer first.
        around: The embedding, (V, M), and the weights of the last norm and the head.
        batch: Rows.
    """
    device, dtype = around[0].device, around[0].dtype
    if not FEWEST_ROWS <= batch <= MOST_ROWS or dtype.itemsize != 2 or len(layers) > MOST_LAYERS:
        return False
    shape = shape_of(layers[0])
    if shape.width < LEAST_WIDTH or not has_room(device):
        return False
    count = clusters(device)
    if count == 0 or plan(shape, batch, count) is None:
        return False
    strides = layers[0].conv_state.stride(), layers[0].ssm_state.stride()
    side_by_side = (strides[0][1:], strides[1][1:]) == ((shape.taps - 1, 1), (shape.states, 1))
    if not side_by_side or strides[0][0] % 8 or strides[1][0] % 4:
        return False
    return all(
        shape_of(layer) == shape
        and (layer.conv_state.stride(), layer.ssm_state.stride()) == strides
        and all(tensor is not None and tensor.data_ptr() % 16 == 0 for tensor in layer[:12])
        for layer in layers
    ) and all(tensor.data_ptr() % 16 == 0 for tensor in around)


def step(
    tokens: Tensor,
    embedding: Tensor,
    layers: Sequence[Layer],
    norm_f: Tensor,
    head: Tensor,
    eps: Sequence[float],
    deferred: DeferredStates | None = None,
) -> Tensor:
    """Logits, (B, V); arguments as in `model_step.model_step`."""
    tokens = tokens.contiguous()
    batch, vocab, device = tokens.shape[0], head.shape[0], head.device
    shape, count = shape_of(layers[0]), clusters(device)
    layout = plan(shape, batch, count)
    assert layout is not None
    logits = head.new_empty(batch, vocab)
    x, y, *others = _exchanged(batch, shape, count, head)
    maps = [tensor_map(layer.in_proj, 16, SWIZZLED) for layer in layers]
    maps += [tensor_map(layer.out_proj, 8, SWIZZLED) for layer in layers]
    maps += [_steering_map(layer.x_proj, _own(shape, count)) for layer in layers]
    maps += [tensor_map(head, 16, SWIZZLED)]
    maps += [tensor_map(tensor, tile_of(batch), SWIZZLED) for tensor in (x, y)]
    kept_map, *kept = _kept(deferred, tile_of(batch) // CLUSTER, _own(shape, count))
    maps += [kept_map]
    addresses = [
        tensor.data_ptr()
        for layer in layers
        for tensor in (layer.norm, *layer[2:4], *layer[5:9], *layer[10:12])  # All that has no map
        if tensor is not None
    ]
    around = tokens, embedding, norm_f, logits, x, y, *others
    addresses += (tensor.data_ptr() for tensor in around)
    numbers = *kept, batch, vocab, layers[0].conv_state.stride(0), layers[0].ssm_state.stride(0)
    parameters = b"".join(maps) + struct.pack(
        f"{len(addresses) + len(numbers)}q{len(eps)}d", *addresses, *numbers, *eps
    )
    parameters += bytes(-len(parameters) % 64)  # As the struct has, whose maps begin at 64 bytes.
    token = "int64" if tokens.dtype == torch.int64 else "int"
    constants = _constants(
        head.dtype, token, len(layers), shape, batch, count, layout, deferred is not None
    )
    launch = kernel("decode_rows.cu", "decode_rows", device, **constants)
    launch.with_struct(CLUSTER * count, THREADS, parameters, shared=SHARED, together=True)
    return logits


@functools.cache
def clusters(device: torch.device) -> int:
    """How many clusters of blocks with all of a multiprocessor's shared memory run on the GPU at once.

    Fewer than a quarter of the multiprocessors: a cluster lies in one part of the chip, and parts differ in size.
    """
    probe = kernel("cluster_room.cu", "cluster_room", device, CLUSTER=CLUSTER)
    return min(MOST_CLUSTERS, probe.clusters(THREADS, shared=SHARED))


def _kept(deferred: DeferredStates | None, rows: int, own: int) -> tuple[bytes, int, int, int, int]:
    """What deferred states have not read: the map of dt and x, in boxes of so many rows and channels, and addresses."""
    if deferred is None:
        return bytes(128), 0, 0, 0, 0
    inputs, B, turns = deferred.inputs, deferred.B, deferred.turns
    box = tensor_map(inputs.flatten(0, 1), 1, rows, own, swizzled=False)
    return box, inputs.data_ptr(), B.data_ptr(), turns.data_ptr(), deferred.stored_rows


def _steering_map(x_proj: Tensor, own: int) -> bytes:
    """Of x_proj, (R + 2 N, D), for so many channels of a cluster: boxes as large as a slot, row after row.

    A box has eight columns more than are used, which keep neighbouring rows in different banks of shared memory.
    """
    rows = 128 * own // (2 * own + 16) // 8 * 8
    return tensor_map(x_proj, rows, own + 8, swizzled=False)


def tile_of(batch: int) -> int:
    """Rows that a block has room for: 16, 32, 64 or 128."""
    return max(16, 1 << (batch - 1).bit_length())


def _exchanged(batch: int, shape: Shape, clusters: int, like: Tensor) -> list[Tensor]:
    """What blocks exchange, in the order of the kernel's parameters; only counts need a value, zero."""
    sizes = (shape.width, shape.channels, shape.steering)
    halves = [like.new_empty(batch, size) for size in sizes]
    partials = torch.empty(clusters, batch, shape.steering, device=like.device)
    squares = torch.empty(batch, MOST_CLUSTERS, device=like.device)
    priors = torch.empty(batch, device=like.device)
    counts = torch.zeros(4, MOST_CLUSTERS, 32, dtype=torch.int32, device=like.device)
    return [*halves, partials, squares, priors, counts]


def _own(shape: Shape, clusters: int) -> int:
    """Channels of a cluster, at most."""
    return UNIT * -(-shape.channels // (UNIT * clusters))


def _pitch(columns: int) -> int:
    """Sums from row to row, such that neighbouring rows are in different banks."""
    return (columns + 15) // 32 * 32 + 16


def _constants(
    dtype: torch.dtype,
    token: str,
    layers: int,
    shape: Shape,
    batch: int,
    clusters: int,
    layout: Layout,
    defers: bool,
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
        "BATCH": tile_of(batch),
        "CLUSTERS": clusters,
        "DEFERS": int(defers),
        "WARPGROUPS": THREADS // 128,
        "SLOTS": layout.slots,
        "X_SLOTS": layout.x_slots,
        "IN_FLIGHT": min(IN_FLIGHT if batch <= 64 else IN_FLIGHT_OF_MANY, layout.slots),
        "SHARED": SHARED,
    }


def variants() -> Variants:
    """The kernels of the released models in 30 clusters, as on an H100, and of the other sizes of a batch."""
    found: Variants = [("cluster_room.cu", "cluster_room", {"CLUSTER": CLUSTER})]
    for width, layers, batch, dtype in (
        (768, 24, 64, torch.bfloat16),
        (1024, 48, 16, torch.float16),
        (1536, 48, 32, torch.bfloat16),
        (2048, 48, 64, torch.bfloat16),
        (2048, 48, 128, torch.float16),
        (2560, 64, 128, torch.bfloat16),
    ):
        shape = Shape(width, 2 * width, width // 16, 16, 4)
        layout = plan(shape, batch, 30)
        assert layout is not None
        for defers in (False, True):
            constants = _constants(dtype, "int64", layers, shape, batch, 30, layout, defers)
            found.append(("decode_rows.cu", "decode_rows", constants))
    return found
