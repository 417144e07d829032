"""One decoding step of a whole model on a GPU in one kernel, for 9 to 128 rows; see `kernels/decode_rows.cu`."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.ops.cuda.arrays import TYPES
from mambakit.ops.cuda.compiler import kernel
from mambakit.ops.cuda.one_kernel_step import Shape, _shape
from mambakit.ops.model_layer import Layer

CLUSTER = 4
CLUSTERS = 30
WARPS = 8
IN_FLIGHT = 4
SHARED = 226 * 1024
BOX = 64
EXTRA: dict[str, int] = {}


class Layout(NamedTuple):
    slots: int
    x_slots: int


def plan(shape: Shape, batch: int) -> Layout | None:
    tile = _tile(batch)
    own, share = 16 * -(-shape.channels // 16 // CLUSTERS), tile // CLUSTER
    columns = own // 2
    tiles = 2 if tile > 64 else 1
    sums = share * max(4 * (own // tiles + 8), 8 // tiles * (columns + 8))
    rows = max(16, share)
    x_slots = 4 if tile <= 64 else 3
    used = (
        4 * sums + 2 * (rows + share) * (own + 8) + 2 * rows * (shape.rank + 8) + 4 * share * 2 * shape.states
        + 2 * share * own + 4 * share * columns + 8 * tile + 4 * share + 4 * own + 32 + 16 * x_slots + 256
    )
    slots = (SHARED - used - x_slots * tile * 128) // (own * 128 + 16)
    return Layout(min(slots, 32), x_slots)


def _tile(batch: int) -> int:
    return max(16, 1 << (batch - 1).bit_length())


@functools.lru_cache(maxsize=4096)
def _map(address: int, rows: int, columns: int, box: int, dtype: torch.dtype) -> bytes:
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = (
        kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        if dtype is torch.bfloat16
        else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    )
    status, found = driver.cuTensorMapEncodeTiled(
        kind, 2, address,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)], [driver.cuuint64_t(2 * columns)],
        [driver.cuuint32_t(BOX), driver.cuuint32_t(box)], [driver.cuuint32_t(1), driver.cuuint32_t(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    assert int(status) == 0, status
    return struct.pack("16Q", *map(int, found.opaque))


def tensor_map(matrix: Tensor, box: int) -> bytes:
    return _map(matrix.data_ptr(), *matrix.shape, box, matrix.dtype)


def step(
    tokens: Tensor,
    embedding: Tensor,
    layers: Sequence[Layer],
    norm_f: Tensor,
    head: Tensor,
    eps: Sequence[float],
) -> Tensor:
    tokens = tokens.contiguous()
    batch, vocab, device = tokens.shape[0], head.shape[0], head.device
    shape = _shape(layers[0])
    layout = plan(shape, batch)
    assert layout is not None
    logits = head.new_empty(batch, vocab)
    x, y, steering = (head.new_empty(batch, n) for n in (shape.width, shape.channels, shape.steering))
    partials = torch.empty(CLUSTERS, batch, shape.steering, device=device)
    squares, priors = torch.empty(batch, 32, device=device), torch.empty(batch, device=device)
    counts = torch.zeros(4, 32, 32, dtype=torch.int32, device=device)
    maps = [tensor_map(layer.in_proj, 16) for layer in layers]
    maps += [tensor_map(layer.out_proj, 8) for layer in layers]
    maps += [tensor_map(head, 16), tensor_map(x, _tile(batch)), tensor_map(y, _tile(batch))]
    addresses = []
    for la in layers:
        for t in (la.norm, la.conv, la.conv_bias, la.x_proj, la.dt_proj, la.dt_bias, la.A_log, la.D, la.conv_state, la.ssm_state):
            addresses.append(t.data_ptr())
    for t in (tokens, embedding, norm_f, logits, x, y, steering, partials, squares, priors, counts):
        addresses.append(t.data_ptr())
    numbers = batch, vocab, *layers[0].conv_state.stride(), layers[0].ssm_state.stride(0)
    parameters = b"".join(maps) + struct.pack(f"{len(addresses) + len(numbers)}q{len(eps)}d", *addresses, *numbers, *eps)
    if "PROFILE" in EXTRA:
        global PROFILED
        PROFILED = torch.zeros(128, 24, device=device)
        parameters += struct.pack("q", PROFILED.data_ptr())
    parameters += bytes(-len(parameters) % 64)
    token = "int64" if tokens.dtype == torch.int64 else "int"
    constants = _constants(head.dtype, token, len(layers), shape, batch, layout)
    launch = kernel("decode_rows.cu", "decode_rows", device, **constants)
    launch.together(CLUSTER * CLUSTERS, 32 * WARPS + 128, parameters, shared=SHARED)
    return logits


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
        "CLUSTERS": CLUSTERS,
        "WARPGROUPS": 3,
        "SLOTS": layout.slots,
        "X_SLOTS": layout.x_slots,
        "IN_FLIGHT": min(IN_FLIGHT, layout.slots),
        "SHARED": SHARED,
        **EXTRA,
    }
