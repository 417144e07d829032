"""How products of many rows are laid out on tensor cores: pure functions."""

from __future__ import annotations

import pytest

from mambakit.ops.cuda.tensor_core_products import (
    MOST_ROWS,
    MOST_WARPS,
    PIECE,
    SHARED,
    plan,
    shared_memory,
    tile_of,
)

H100 = 132


def test_the_shapes_of_the_released_models() -> None:
    """Rows, warps with rows of their own, blocks of a cluster, warps that share rows, pieces of k of a block."""
    shapes = (
        (3072, 768), (768, 1536), (8192, 2048), (160, 4096), (4096, 128), (2048, 4096), (50280, 2048), (10240, 2560),
        (2560, 5120),
    )  # fmt: skip
    assert [tuple(plan(*shape, 64, 2, H100)) for shape in shapes] == [
        (3072, 3, 4, 4, 6),
        (768, 2, 8, 4, 6),
        (8192, 8, 4, 1, 16),
        (160, 1, 8, 8, 16),
        (4096, 1, 1, 4, 4),
        (2048, 4, 8, 2, 16),
        (50280, 12, 1, 1, 64),
        (10240, 10, 4, 1, 20),
        (2560, 5, 8, 2, 20),
    ]


@pytest.mark.parametrize(("rows", "columns"), [(8192, 2048), (2048, 4096), (2560, 5120)])
@pytest.mark.parametrize("batch", [64, 128])
def test_large_products_are_one_wave_of_blocks(rows: int, columns: int, batch: int) -> None:
    assert 120 <= plan(rows, columns, batch, 2, H100).blocks <= H100


@pytest.mark.parametrize("multiprocessors", [1, 5, 20, 132, 148])
@pytest.mark.parametrize("columns", [8, 48, 72, 768, 5120])
@pytest.mark.parametrize("rows", [1, 33, 160, 3072, 50280])
@pytest.mark.parametrize("x_bytes", [2, 4])
def test_every_number_has_one_place(
    rows: int, columns: int, x_bytes: int, multiprocessors: int
) -> None:
    for batch in (1, 8, 9, 16, 33, 64, 65, MOST_ROWS):
        tiles = plan(rows, columns, batch, x_bytes, multiprocessors)
        found = tiles.constants(batch, x_bytes)
        of_block = PIECE * found["WARPS_M"]
        assert of_block * (tiles.parts - 1) < rows <= of_block * tiles.parts
        assert tiles.blocks == tiles.parts * found["CLUSTER"]
        assert tiles.pieces * PIECE * (found["CLUSTER"] - 1) < columns
        assert columns <= tiles.pieces * PIECE * found["CLUSTER"]
        assert batch <= found["BATCH"]
        assert found["BATCH"] % (8 * found["WARPS_N"]) == found["BATCH"] % found["CLUSTER"] == 0
        assert found["STEPS"] % found["WARPS_K"] == 0
        assert found["STAGES"] >= 2
        assert found["WARPS_M"] * found["WARPS_N"] * found["WARPS_K"] <= MOST_WARPS
        assert shared_memory(found, x_bytes) <= SHARED


@pytest.mark.parametrize(("rows", "columns"), [(3072, 768), (80, 1536), (2048, 4096)])
@pytest.mark.parametrize(("fewest", "most"), [(1, 64), (65, 128)])
def test_the_order_of_sums_is_the_same_for_all_batches_of_a_kind(
    rows: int, columns: int, fewest: int, most: int
) -> None:
    assert len({plan(rows, columns, batch, 2, H100) for batch in range(fewest, most + 1)}) == 1


def test_shared_memory_holds_the_stages_and_then_the_sums() -> None:
    """Of 96 rows and 64 rows of x: 3 stages of 2 pieces; sums with 4 numbers between rows; those of one other warp."""
    constants = {"BATCH": 64, "WARPS_M": 3, "WARPS_N": 1, "WARPS_K": 2, "STEPS": 2, "STAGES": 3}
    assert shared_memory(constants, 2) == 3 * 2 * 32 * 2 * (96 + 64)
    assert shared_memory({**constants, "STAGES": 1}, 2) == 64 * (96 + 4) * 4
    assert shared_memory({**constants, "STAGES": 1, "WARPS_K": 4}, 2) == 3 * 96 * 64 * 4


def test_tiles() -> None:
    assert [tile_of(batch) for batch in (1, 8, 9, 16, 17, 64, 65, 128)] == [8, 8, 16, 16, 32, 64, 128, 128]  # fmt: skip
