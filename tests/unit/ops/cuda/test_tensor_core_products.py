"""How products of many rows are laid out on tensor cores: pure functions."""

from __future__ import annotations

import pytest

from mambakit.ops.cuda.tensor_core_products import (
    ALIGNED,
    MOST_ROWS,
    MOST_SUMS,
    MOST_WARPS,
    PIECE,
    SHARED,
    Tiles,
    plan,
    tile_of,
)

H100 = 132


@pytest.mark.parametrize(
    ("has_warpgroups", "expected"),
    [
        (
            False,
            [
                (3072, 3, 4, 4, 6, 0),
                (768, 2, 8, 4, 6, 0),
                (8192, 8, 4, 1, 16, 0),
                (160, 1, 8, 8, 16, 0),
                (4096, 1, 1, 4, 4, 0),
                (2048, 4, 8, 2, 16, 0),
                (50280, 12, 1, 1, 64, 0),
                (10240, 10, 4, 1, 20, 0),
                (2560, 5, 8, 2, 20, 0),
            ],
        ),
        (
            True,
            [
                (3072, 3, 4, 1, 6, 1),
                (768, 2, 8, 1, 6, 2),
                (8192, 8, 4, 1, 16, 2),
                (160, 1, 8, 1, 16, 1),
                (4096, 1, 1, 1, 4, 1),
                (2048, 4, 8, 1, 16, 2),
                (50280, 12, 1, 1, 64, 2),
                (10240, 10, 4, 1, 20, 2),
                (2560, 5, 8, 1, 20, 1),
            ],
        ),
    ],
)
def test_the_shapes_of_the_released_models(
    has_warpgroups: bool, expected: list[tuple[int, ...]]
) -> None:
    """Rows, a block's pieces of rows, blocks of a cluster, warps along k, a block's pieces of k, warpgroups."""
    shapes = (
        (3072, 768), (768, 1536), (8192, 2048), (160, 4096), (4096, 128), (2048, 4096), (50280, 2048), (10240, 2560),
        (2560, 5120),
    )  # fmt: skip
    found = [plan(*shape, 2, H100, has_warpgroups=has_warpgroups) for shape in shapes]
    assert [tuple(tiles) for tiles in found] == expected


@pytest.mark.parametrize("has_warpgroups", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(8192, 2048), (2048, 4096), (2560, 5120)])
def test_large_products_are_one_wave_of_blocks(
    rows: int, columns: int, has_warpgroups: bool
) -> None:
    tiles = plan(rows, columns, 2, H100, has_warpgroups=has_warpgroups)
    assert 120 <= tiles.blocks <= H100


@pytest.mark.parametrize("has_warpgroups", [False, True])
@pytest.mark.parametrize("multiprocessors", [1, 5, 20, 132, 148])
@pytest.mark.parametrize("columns", [8, 48, 72, 768, 5120])
@pytest.mark.parametrize("rows", [1, 33, 160, 3072, 50280])
@pytest.mark.parametrize("x_bytes", [2, 4])
def test_every_number_has_one_place(
    rows: int, columns: int, x_bytes: int, multiprocessors: int, has_warpgroups: bool
) -> None:
    tiles = plan(rows, columns, x_bytes, multiprocessors, has_warpgroups=has_warpgroups)
    for batch in (1, 8, 9, 16, 33, MOST_ROWS):
        found = tiles.constants(batch, x_bytes)
        of_block = found["TILE"]
        assert of_block * (tiles.parts - 1) < rows <= of_block * tiles.parts
        assert tiles.blocks == tiles.parts * found["CLUSTER"]
        assert tiles.pieces * PIECE * (found["CLUSTER"] - 1) < columns
        assert columns <= tiles.pieces * PIECE * found["CLUSTER"]
        assert batch <= found["BATCH"]
        assert found["BATCH"] % found["CLUSTER"] == 0
        assert found["STAGES"] >= 2
        assert tiles.shared_memory(batch, x_bytes) <= SHARED + ALIGNED
        if tiles.warpgroups:
            assert (has_warpgroups, x_bytes) == (True, 2)
            own = of_block // tiles.warpgroups
            assert own % PIECE == 0
            assert own / 2 <= MOST_SUMS  # sums of 64 rows of x, of 128 threads
            assert tiles.threads == 128 * found["WARPGROUPS"]
        else:
            warps = of_block // PIECE * found["WARPS_K"]
            assert tiles.threads == 32 * warps
            assert warps <= MOST_WARPS
            assert found["STEPS"] % found["WARPS_K"] == 0


def test_shared_memory_holds_the_stages_and_then_the_sums() -> None:
    """Stages of W and x; sums of 64 rows of x with 8 numbers between them; those of the other warps along k."""
    by_warps = Tiles(rows=96, height=3, cluster=1, split=2, pieces=4, warpgroups=0)
    assert by_warps.constants(64, 2)["STAGES"] == 3
    assert by_warps.shared_memory(64, 2) == ALIGNED + 3 * 2 * 32 * 2 * (96 + 64)
    short = by_warps._replace(pieces=2)
    assert short.shared_memory(8, 2) == ALIGNED + 2 * 2 * 32 * 2 * (96 + 8)
    assert short._replace(split=4).shared_memory(64, 2) == ALIGNED + 2 * 4 * 32 * 2 * (96 + 64)
    together = by_warps._replace(split=1, warpgroups=1, pieces=1)
    assert together.constants(16, 2)["STEPS"] == 2
    assert together.shared_memory(16, 2) == ALIGNED + 2 * 2 * 32 * 2 * (96 + 64)


def test_tiles() -> None:
    assert [tile_of(batch) for batch in (1, 8, 9, 16, 17, 64)] == [8, 8, 16, 16, 32, 64]
