"""How a product of up to 64 rows with a matrix is laid out on tensor cores; see `kernels/matmul.cuh`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

FEWEST_ROWS, MOST_ROWS = 5, 64
"""Of x, for which these products are taken where they fit: what they are faster for (docs/lab-notes.md)."""

PIECE = 32
"""Numbers along k that are multiplied together, and rows of the matrix that a warp has."""

MOST_WARPS = 12
"""Of a block; their registers and those of the next kernel's first blocks should fit into a multiprocessor."""

MOST_SUMS = 96
"""Of a thread of a warpgroup."""

SHARED = 98 * 1024
"""Bytes of shared memory of a block: every GPU with clusters gives 99 KB. Two such blocks fit into a multiprocessor of
the larger ones, so that the next kernel's can begin."""

CLUSTERS = (1, 2, 4, 8)
"""Blocks of a cluster; eight are what every GPU that knows clusters can do."""

NEIGHBOURS = 16
"""Multiprocessors that a cluster may lie on: at least so many share a part of the chip."""

ALIGNED = 512
"""Bytes that a block's shared memory is moved by at most, to begin where it must."""


class Tiles(NamedTuple):
    """Who multiplies what."""

    rows: int
    """Of the matrix."""
    height: int
    """Times `PIECE`, the rows of the matrix that a block has."""
    cluster: int
    """Blocks that share rows, and have a part of k each."""
    split: int
    """Warps of a block that share rows, and have every so manieth piece of k each."""
    pieces: int
    """Of a block along k."""
    warpgroups: int
    """That multiply together; 0: every warp by itself."""

    @property
    def parts(self) -> int:
        """Clusters that the matrix needs."""
        return -(-self.rows // (PIECE * self.height))

    @property
    def blocks(self) -> int:
        """Of all clusters."""
        return self.parts * self.cluster

    @property
    def threads(self) -> int:
        """Of a block."""
        if self.warpgroups:
            return 128 * self.warpgroups
        return 32 * self.height * self.split

    def constants(self, batch: int, x_bytes: int) -> dict[str, int]:
        """As the kernels read them.

        Args:
            batch: Rows of x.
            x_bytes: Of a number of x.
        """
        tile = tile_of(batch)
        piece = _piece(self.height, self._x_rows(tile), x_bytes)
        steps = self.split
        if self.warpgroups and 6 * piece <= SHARED:
            steps = 2
        return {
            "TILE": PIECE * self.height,
            "CLUSTER": self.cluster,
            "BATCH": tile,
            "STEPS": steps,
            "STAGES": max(2, min(SHARED // (steps * piece), -(-self.pieces // steps) + 1)),
            **({"WARPGROUPS": self.warpgroups} if self.warpgroups else {"WARPS_K": self.split}),
        }

    def shared_memory(self, batch: int, x_bytes: int) -> int:
        """Bytes that a block takes: for its stages, and afterwards for its sums."""
        tile, constants = tile_of(batch), self.constants(batch, x_bytes)
        stage = constants["STEPS"] * _piece(self.height, self._x_rows(tile), x_bytes)
        of_warps = (self.split - 1) * PIECE * self.height * tile * 4
        return ALIGNED + max(constants["STAGES"] * stage, _sums(self.height, tile), of_warps)

    def _x_rows(self, tile: int) -> int:
        return MOST_ROWS if self.warpgroups else tile


def tile_of(batch: int) -> int:
    """Rows of x for which a block has room: 8, 16, 32 or 64."""
    return max(8, 1 << (batch - 1).bit_length())


@functools.cache
def plan(
    rows: int, columns: int, x_bytes: int, multiprocessors: int, *, has_warpgroups: bool
) -> Tiles:
    """The layout of a product, the same for all batches.

    Every block reads its part of the matrix, and all of x for its part of k; blocks of a cluster exchange sums. Many
    rows in a block save reads of x, and parts of k make up for the blocks that there are fewer of. Taken is the layout
    in which the busiest multiprocessor moves the fewest bytes.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        x_bytes: Of a number of x; those of four bytes are not for warpgroups.
        multiprocessors: Of the GPU.
        has_warpgroups: Whether its warps can multiply together.
    """
    layouts = _by_warpgroups if has_warpgroups and x_bytes == 2 else _by_warps
    pieces = -(-columns // PIECE)
    found = []
    for cluster in CLUSTERS:
        if cluster > pieces:
            break
        for tiles in layouts(rows, -(-pieces // cluster), cluster, x_bytes):
            found.append((_moved(tiles, x_bytes, multiprocessors), tiles))
    return min(found)[1]


def _by_warpgroups(rows: int, pieces: int, cluster: int, x_bytes: int) -> Iterator[Tiles]:
    """One warpgroup, or two with half of the rows of the matrix each."""
    for height in range(1, MOST_WARPS + 1):
        warpgroups = 2 if height % 2 == 0 else 1
        are_few = height // warpgroups * PIECE // 2 <= MOST_SUMS
        if are_few and 3 * _piece(height, MOST_ROWS, x_bytes) <= SHARED:
            yield Tiles(rows, height, cluster, 1, pieces, warpgroups)


def _by_warps(rows: int, pieces: int, cluster: int, x_bytes: int) -> Iterator[Tiles]:
    """As many warps along k as there is work and room for."""
    for height in range(1, MOST_WARPS + 1):
        split = next(
            split
            for split in (8, 4, 2, 1)
            if split <= pieces
            and split * height <= MOST_WARPS
            and 2 * split * _piece(height, MOST_ROWS, x_bytes) <= SHARED
        )
        yield Tiles(rows, height, cluster, split, pieces, 0)


def _moved(tiles: Tiles, x_bytes: int, multiprocessors: int) -> int:
    """Bytes that the busiest multiprocessor moves."""
    own = PIECE * tiles.height
    room = multiprocessors
    if tiles.cluster > 1:
        room = max(1, multiprocessors // NEIGHBOURS * NEIGHBOURS // tiles.cluster)
    sums = own * MOST_ROWS * 4 if tiles.cluster > 1 else 0
    return -(-tiles.parts // room) * (tiles.pieces * PIECE * (2 * own + x_bytes * MOST_ROWS) + sums)


def _piece(height: int, x_rows: int, x_bytes: int) -> int:
    """Bytes of a piece of the matrix and of x."""
    return PIECE * (2 * PIECE * height + x_bytes * x_rows)


def _sums(height: int, tile: int) -> int:
    """Bytes of the sums of so many rows of x, with room between them."""
    return 4 * tile * (PIECE * height + 8)
