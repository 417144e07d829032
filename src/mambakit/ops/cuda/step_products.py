"""The products of a decoding step: which kernel multiplies, and how it is launched; see `kernels/product.cuh`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.ops.cuda import products, tensor_core_products
from mambakit.ops.cuda.arrays import (
    TYPES,
    Variants,
    has_clusters,
    has_warpgroups,
    lanes,
    multiprocessors,
)
from mambakit.ops.model_layer import Layer

NEIGHBOURS = 4
"""Rows of the matrix whose results a thread reads and writes together, at most."""

FEW = (
    (768, 1, torch.bfloat16),
    (2048, 2, torch.bfloat16),
    (2560, 8, torch.bfloat16),
    (1024, 4, torch.float16),
    (768, 8, torch.float32),
    (17, 4, torch.bfloat16),
)
"""Widths, rows and dtypes of steps that are done number by number, of which the tests compile the kernels."""


class Product(NamedTuple):
    """How a kernel with a product is launched."""

    constants: dict[str, int | str]
    grid: tuple[int, int]
    block: int
    """Threads of a block."""
    shared: int
    """Bytes of dynamic shared memory."""
    parts: int
    """Parts of the rows of the matrix, each of which gives sums of squares."""


def product(weight: Tensor, x: Tensor, neighbours: int) -> Product:
    """Of a matrix with x: on tensor cores where that is meant to be, else number by number.

    Args:
        weight: (O, K).
        x: (B, K).
        neighbours: Rows of the matrix whose results are read and written together, where a thread has several: 1, 2 or
            4, a divisor of O.
    """
    along = lanes(16 // weight.element_size(), weight.shape[1], weight, x)
    count = multiprocessors(weight.device)
    if _are_for_tensor_cores(x.shape[0], weight, along):
        together = has_warpgroups(weight.device)
        return _on_tensor_cores(weight.shape, x, weight.dtype, neighbours, count, together)
    return _by_numbers(weight.shape, x, weight.dtype, along, count)


def are_for_tensor_cores(layer: Layer, batch: int) -> bool:
    """Whether all products of a layer with so many rows are; of what they read, every row starts at 16 bytes."""
    weights = layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj
    reach = math.gcd(layer.x_proj.shape[0], *(weight.shape[1] for weight in weights))
    return all(_are_for_tensor_cores(batch, each, lanes(8, reach, each)) for each in weights)


def _are_for_tensor_cores(batch: int, weight: Tensor, along: int) -> bool:
    fits = weight.element_size() == 2 and along == 8 and has_clusters(weight.device)
    return fits and tensor_core_products.FEWEST_ROWS <= batch <= tensor_core_products.MOST_ROWS


def _on_tensor_cores(
    shape: torch.Size, x: Tensor, dtype: torch.dtype, neighbours: int, count: int, together: bool
) -> Product:
    (rows, columns), batch, x_bytes = shape, x.shape[0], x.element_size()
    tiles = tensor_core_products.plan(rows, columns, x_bytes, count, has_warpgroups=together)
    constants = tiles.constants(batch, x_bytes)
    return Product(
        {**types(dtype, x.dtype), **constants, "NEIGHBOURS": neighbours},
        (tiles.blocks, 1),
        tiles.threads,
        tiles.shared_memory(batch, x_bytes),
        tiles.parts,
    )


def _by_numbers(
    shape: torch.Size, x: Tensor, dtype: torch.dtype, along: int, count: int
) -> Product:
    rows, columns = shape
    layout = products.plan(rows, columns, along, count)
    constants = layout.constants(x.shape[0])
    blocks, turns = layout.blocks(rows), -(-x.shape[0] // products.tile_of(x.shape[0]))
    return Product(
        {**types(dtype, x.dtype), "LANES": along, **constants},
        (blocks, turns),
        32 * constants["WARPS"],
        0,
        blocks,
    )


def types(io: torch.dtype, x: torch.dtype) -> dict[str, int | str]:
    """The constants of a kernel's types."""
    return {"IO": TYPES[io], "X": TYPES[x]}


def scaled_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the residual stream times the weight of a norm, which float16 could not hold."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def variants() -> Variants:
    """The kernels with products of the released models' shapes on 132 multiprocessors, and of odd sizes."""
    found: Variants = []
    for d_model, batch, io in (
        *FEW,
        (2048, 64, torch.bfloat16),
        (768, 16, torch.bfloat16),
        (1536, 32, torch.float16),
        (2560, 64, torch.float16),
    ):
        d_inner, rank, scaled = 2 * d_model, -(-d_model // 16), scaled_dtype(io)
        are_few = batch <= products.MOST_ROWS
        kept = torch.float32 if are_few else io
        of_kernel: list[tuple[str, int, int, torch.dtype, dict[str, int | str]]] = [
            ("in_proj", 2 * d_inner, d_model, scaled, {"TAPS": 4}),
            ("linear", rank + 32, d_inner, io, {"Y": TYPES[kept]}),
            ("linear", d_inner, rank, io, {"Y": TYPES[kept]}),
            ("out_proj", d_model, d_inner, io, {"SCALED": TYPES[scaled]}),
            ("head", 50280, d_model, scaled, {}),
        ]
        for name, rows, columns, x_dtype, more in of_kernel:
            shape, x = torch.Size((rows, columns)), torch.empty(batch, 0, dtype=x_dtype)
            if are_few:
                along = lanes(16 // io.itemsize, columns)
                of_shape = [_by_numbers(shape, x, io, along, 132)]
            else:
                of_shape = [
                    _on_tensor_cores(shape, x, io, lanes(NEIGHBOURS, rows), 132, together)
                    for together in (False, True)
                ]
            for launched in of_shape:
                constants = {**launched.constants, **more}
                found.append((f"decode_{name}.cu", f"decode_{name}", constants))
    return found
