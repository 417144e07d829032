"""How the kernel that convolves and multiplies is laid out; what it computes is compared on a GPU."""

from __future__ import annotations

import pytest

from mambakit.ops.cuda.causal_conv1d_linear import MOST_COLUMNS, Layout, plan

MULTIPROCESSORS, SHARED = 132, 227 * 1024


@pytest.mark.parametrize("columns", [2, 80, 96, 128, 160, 162, 192, 200, 202, MOST_COLUMNS])
@pytest.mark.parametrize("rows", [64 * 132, 128 * 132])
def test_a_layout_fits_into_a_multiprocessor(columns: int, rows: int) -> None:
    layout = plan(rows // 64, 64, columns, MULTIPROCESSORS)
    assert layout is not None
    for width in (2, 3, 4):
        assert layout.shared_memory(width, columns, 4) <= SHARED
    multiplying, convolving = layout.registers(columns)
    assert multiplying % 8 == convolving % 8 == 0
    assert multiplying + 2 * convolving <= 512  # as ptxas divides 65,536 among three warpgroups
    assert layout.tiles * columns / 2 + 32 <= multiplying <= 240
    assert convolving >= 128


@pytest.mark.parametrize(
    ("batch", "seqlen", "tiles"),
    [
        (64, 2048, 2),
        (16, 2048, 2),
        (8, 2048, 2),
        (4, 2048, 1),
        (2, 2048, None),
        (1, 2048, None),
        (1, 65536, 2),
        (8192, 1, None),
        (200, 65, None),
        (0, 2048, None),
        (64, 0, None),
    ],
)
def test_it_is_taken_where_it_is_faster(batch: int, seqlen: int, tiles: int | None) -> None:
    layout = plan(batch, seqlen, 160, MULTIPROCESSORS)
    assert layout == (None if tiles is None else Layout(tiles, 4, 3, 3))


def test_few_tiles_for_many_columns() -> None:
    layout = plan(64, 2048, MOST_COLUMNS, MULTIPROCESSORS)
    assert layout is not None
    assert layout.tiles == 1
