"""Channels-last activations as the kernels see them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable


class Rows(NamedTuple):
    """A (B, L, D) array whose channels are neighbours in memory; its rows may lie anywhere."""

    data: np.ndarray
    batch_stride: int
    time_stride: int


@register_jitable
def row(rows, b, t, channel, width):
    """The `width` values from `channel` on, at batch row b and time t."""
    start = b * rows.batch_stride + t * rows.time_stride + channel
    return rows.data[start : start + width]
