"""How a product of a few rows with a matrix is laid out on a GPU; see `kernels/matvec.cuh`."""

from __future__ import annotations

import functools
from typing import NamedTuple

MOST_ROWS = 8
"""Of x, that a kernel multiplies while it reads the matrix once."""

ENOUGH_WARPS = 8
"""Of a multiprocessor, two blocks of four: with fewer, too few reads are on their way."""

READS = 8
"""Accesses of 16 bytes that a lane has on their way: 16 warps of a multiprocessor then wait for 64 KB. Half as many
where sums of four rows and more take the registers."""

MOST_SUMS = 16
"""Of a lane; more, and a warp has fewer rows of the matrix instead, and a block more warps."""


class Layout(NamedTuple):
    """Who reads what."""

    rows: int
    """Rows of the matrix that a warp has, if the batch is small."""
    split: int
    """Warps that share them."""
    chunks: int
    """Accesses of a lane to each row."""

    def blocks(self, rows: int) -> int:
        """Blocks that a matrix with so many rows needs, whatever the batch."""
        return -(-rows // (self._warps // self.split * self.rows))

    def constants(self, batch: int) -> dict[str, int]:
        """As the kernels read them, for so many rows of x."""
        tile = tile_of(batch)
        fewer = max(1, self.rows * tile // MOST_SUMS)
        rows, reads = self.rows // fewer, READS if tile <= 2 else READS // 2
        return {
            "ROWS": rows,
            "SPLIT": self.split,
            "WARPS": self._warps * fewer,
            "DEPTH": max(1, min(self.chunks, reads // rows)),
            "BATCH": tile,
        }

    @property
    def _warps(self) -> int:
        return max(4, self.split)


def tile_of(batch: int) -> int:
    """Rows of x that a block takes at a time: 1, 2, 4 or 8."""
    return min(MOST_ROWS, 1 << (batch - 1).bit_length())


@functools.cache
def plan(rows: int, columns: int, along: int, multiprocessors: int) -> Layout:
    """The layout of a product with a matrix of this shape, the same for every batch.

    Many rows a warp save reads of x, and splitting rows among warps keeps a small matrix from leaving multiprocessors
    idle: the most rows, and then the least splitting, that make enough warps with equal parts.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        along: Neighbouring numbers in one access.
        multiprocessors: Of the GPU.
    """
    chunks = -(-columns // (32 * along))
    for each in (4, 2, 1):
        for split in (1, 2, 4, 8):
            even = chunks % split == 0 or chunks >= 4 * split
            if even and -(-rows // each) * split >= ENOUGH_WARPS * multiprocessors:
                return Layout(each, split, -(-chunks // split))
    split = next(split for split in (8, 4, 2, 1) if split <= max(chunks, 1))
    return Layout(1, split, -(-chunks // split))
