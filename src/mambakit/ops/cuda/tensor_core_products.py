"""How a product of up to 128 rows with a matrix is laid out on tensor cores; see `kernels/matmul.cuh`."""

from __future__ import annotations

import functools
from typing import NamedTuple

FEWEST_ROWS, MOST_ROWS = 129, 128
"""Of x, for which these products are taken where they fit. None, until they have run on a GPU: they were compared on a
CPU alone (docs/lab-notes.md). With 9 they replace the library's, with 4 also what is done number by number."""

NARROW = 64
"""Up to so many rows of x one warp has them all; of more, two have half each."""

PIECE = 32
"""Numbers along k that are multiplied together, and rows of the matrix that a warp has."""

MOST_WARPS = 12
"""Of a block; their registers and those of the next kernel's first blocks should fit into a multiprocessor."""

SHARED = 98 * 1024
"""Bytes of shared memory of a block: every GPU with clusters gives 99 KB. Two such blocks fit into a multiprocessor of
the larger ones, so that the next kernel's can begin."""

CLUSTERS = (1, 2, 4, 8)
"""Blocks of a cluster; eight are what every GPU that knows clusters can do."""

NEIGHBOURS = 16
"""Multiprocessors that a cluster may lie on: at least so many share a part of the chip."""


class Tiles(NamedTuple):
    """Who multiplies what."""

    rows: int
    """Of the matrix."""
    height: int
    """Warps of a block with rows of their own, `PIECE` each."""
    cluster: int
    """Blocks that share rows, and have a part of k each."""
    split: int
    """Warps of a block that share rows, and have every so manieth piece of k each."""
    pieces: int
    """Of a block along k."""

    @property
    def parts(self) -> int:
        """Clusters that the matrix needs."""
        return -(-self.rows // (PIECE * self.height))

    @property
    def blocks(self) -> int:
        """Of all clusters."""
        return self.parts * self.cluster

    def constants(self, batch: int, x_bytes: int) -> dict[str, int]:
        """As the kernels read them.

        Args:
            batch: Rows of x.
            x_bytes: Of a number of x.
        """
        tile = tile_of(batch)
        stage = _stage(self.height, self.split, tile, x_bytes)
        return {
            "CLUSTER": self.cluster,
            "WARPS_M": self.height,
            "WARPS_N": _width(tile),
            "WARPS_K": self.split,
            "BATCH": tile,
            "STEPS": self.split,
            "STAGES": max(2, min(SHARED // stage, -(-self.pieces // self.split) + 1)),
        }


def shared_memory(constants: dict[str, int], x_bytes: int) -> int:
    """Bytes that a block takes: for its stages, and afterwards for its sums."""
    tile, height, split = constants["BATCH"], constants["WARPS_M"], constants["WARPS_K"]
    stages = constants["STAGES"] * _stage(height, constants["STEPS"], tile, x_bytes)
    return max(stages, _sums(height, tile), (split - 1) * PIECE * height * tile * 4)


def tile_of(batch: int) -> int:
    """Rows of x for which a block has room: 8, 16, 32, 64 or 128."""
    return max(8, 1 << (batch - 1).bit_length())


@functools.cache
def plan(rows: int, columns: int, batch: int, x_bytes: int, multiprocessors: int) -> Tiles:
    """The layout of a product, the same for all batches up to `NARROW`, and for all above.

    Every block reads its part of the matrix, and all of x for its part of k; blocks of a cluster exchange sums. Many
    rows in a block save reads of x, and parts of k make up for the blocks that there are fewer of. Taken is the layout
    in which the busiest multiprocessor moves the fewest bytes.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        batch: Rows of x.
        x_bytes: Of a number of x.
        multiprocessors: Of the GPU.
    """
    tile = NARROW if batch <= NARROW else MOST_ROWS
    pieces = -(-columns // PIECE)
    found = []
    for cluster in CLUSTERS:
        if cluster > pieces:
            break
        each = -(-pieces // cluster)
        for height in range(1, MOST_WARPS // _width(tile) + 1):
            split = _split(height, each, tile, x_bytes)
            tiles = Tiles(rows, height, cluster, split, each)
            found.append((_moved(tiles, tile, x_bytes, multiprocessors), tiles))
    return min(found)[1]


def _moved(tiles: Tiles, tile: int, x_bytes: int, multiprocessors: int) -> int:
    """Bytes that the busiest multiprocessor moves."""
    own = PIECE * tiles.height
    room = multiprocessors
    if tiles.cluster > 1:
        room = max(1, multiprocessors // NEIGHBOURS * NEIGHBOURS // tiles.cluster)
    sums = own * tile * 4 if tiles.cluster > 1 else 0
    return -(-tiles.parts // room) * (tiles.pieces * PIECE * (2 * own + x_bytes * tile) + sums)


def _split(height: int, pieces: int, tile: int, x_bytes: int) -> int:
    """The most warps along k that there is work and room for."""
    return next(
        split
        for split in (8, 4, 2, 1)
        if split <= pieces
        and split * height * _width(tile) <= MOST_WARPS
        and 2 * _stage(height, split, tile, x_bytes) <= SHARED
    )


def _width(tile: int) -> int:
    """Warps that share rows of the matrix, and have some of the rows of x each."""
    return max(1, tile // NARROW)


def _stage(height: int, steps: int, tile: int, x_bytes: int) -> int:
    """Bytes of so many pieces of the matrix and of x."""
    return steps * PIECE * (2 * PIECE * height + x_bytes * tile)


def _sums(height: int, tile: int) -> int:
    return 4 * tile * (PIECE * height + 4)
