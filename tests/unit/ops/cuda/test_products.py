"""How products of a few rows are laid out: pure functions."""

from __future__ import annotations

import pytest

from mambakit.ops.cuda.products import MOST_ROWS, Layout, plan, tile_of

H100 = 132


def test_the_shapes_of_the_released_models() -> None:
    found = {
        (rows, columns): tuple(plan(rows, columns, 8, H100))
        for rows, columns in (
            (3072, 768), (80, 1536), (768, 1536), (50280, 768), (8192, 2048), (2048, 4096), (2560, 5120)
        )
    }  # fmt: skip
    assert found == {
        (3072, 768): (2, 1, 3),
        (80, 1536): (1, 4, 2),
        (768, 1536): (1, 2, 3),
        (50280, 768): (4, 1, 3),
        (8192, 2048): (4, 1, 8),
        (2048, 4096): (4, 4, 4),
        (2560, 5120): (4, 2, 10),
    }


@pytest.mark.parametrize("multiprocessors", [1, 20, 108, 132, 148])
@pytest.mark.parametrize("columns", [1, 17, 256, 768, 5120])
@pytest.mark.parametrize("rows", [1, 3, 80, 3072, 50280])
@pytest.mark.parametrize("along", [1, 4, 8])
def test_every_row_has_one_place(rows: int, columns: int, along: int, multiprocessors: int) -> None:
    layout = plan(rows, columns, along, multiprocessors)
    blocks = layout.blocks(rows)
    assert layout.chunks * layout.split * 32 * along >= columns
    for batch in range(1, MOST_ROWS + 1):
        found = layout.constants(batch)
        assert found["BATCH"] >= batch
        assert found["ROWS"] * found["BATCH"] <= 16
        assert found["SPLIT"] == layout.split  # the order of sums is the same for every batch
        assert 32 * found["WARPS"] <= 512
        assert 1 <= found["DEPTH"] <= layout.chunks
        each = found["WARPS"] // found["SPLIT"] * found["ROWS"]
        assert each * (blocks - 1) < rows <= each * blocks


def test_tiles() -> None:
    assert [tile_of(batch) for batch in (1, 2, 3, 4, 5, 8, 9, 200)] == [1, 2, 4, 4, 8, 8, 8, 8]


def test_sums_of_many_rows_get_more_warps_instead_of_more_registers() -> None:
    layout = Layout(rows=4, split=2, chunks=10)
    assert layout.constants(1) == {"ROWS": 4, "SPLIT": 2, "WARPS": 4, "DEPTH": 2, "BATCH": 1}
    assert layout.constants(7) == {"ROWS": 2, "SPLIT": 2, "WARPS": 8, "DEPTH": 2, "BATCH": 8}
