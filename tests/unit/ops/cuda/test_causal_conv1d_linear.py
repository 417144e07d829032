"""How the kernel that convolves and multiplies is laid out; what it computes is compared on a GPU."""

from __future__ import annotations

import pytest

from mambakit.ops.cuda.causal_conv1d_linear import (
    MOST_COLUMNS,
    MOST_TAPS,
    is_faster,
    registers,
    shared_memory,
)

MULTIPROCESSORS, SHARED = 132, 227 * 1024


@pytest.mark.parametrize("columns", [2, 80, 96, 128, 160, 162, 192, MOST_COLUMNS])
def test_fits_into_a_multiprocessor(columns: int) -> None:
    assert shared_memory(MOST_TAPS, columns, 4) <= SHARED
    multiplying, convolving = registers(columns)
    assert multiplying % 8 == convolving % 8 == 0
    assert multiplying + 2 * convolving <= 512  # as ptxas divides 65,536 among three warpgroups
    assert columns + 40 <= multiplying <= 240
    assert convolving >= 128


@pytest.mark.parametrize(
    ("batch", "seqlen", "faster"),
    [
        (64, 2048, True),
        (16, 2048, True),
        (8, 2048, True),
        (4, 2048, False),
        (1, 2048, False),
        (1, 65536, True),
        (8192, 1, False),
        (200, 65, False),
        (0, 2048, False),
        (64, 0, False),
    ],
)
def test_it_is_taken_where_it_is_faster(batch: int, seqlen: int, faster: bool) -> None:
    assert is_faster(batch, seqlen, MULTIPROCESSORS) == faster
