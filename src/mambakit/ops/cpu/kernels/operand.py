"""Rows that are multiplied with a matrix of any format. Its dtype says which, and a kernel is compiled for each.

float32; uint16: bfloat16; int8: codes of eight bits; int16: codes of four bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from mambakit.ops.cpu.kernels.linear import product
from mambakit.ops.cpu.kernels.memory import array_at
from mambakit.ops.cpu.kernels.quantised_linear import quantised_product, round_groups

_FLOATS = (types.float32, types.uint16)


class Operand(NamedTuple):
    """Rows, (B, at least K) float32, and the same rounded: codes (B, K') int16, steps (B, groups) float32.

    Codes and steps are empty where the matrix holds floats, and zero in the padding.
    """

    values: np.ndarray
    codes: np.ndarray
    steps: np.ndarray


def prepare(operand, b, first, last, size, like):
    """Round values first to last of row b of `size`, if matrices are codes; both are bounds of groups, or the end."""


@overload(prepare)
def _prepare(operand, b, first, last, size, like):
    if like.dtype in _FLOATS:
        return lambda operand, b, first, last, size, like: None

    def round_values(operand, b, first, last, size, like):
        group = operand.codes.shape[1] // operand.steps.shape[1]
        groups = first // group, (last + group - 1) // group
        round_groups(operand.values[b, :size], *groups, operand.codes[b], operand.steps[b])

    return round_values


def width_of(columns, operand, like):
    """Numbers in a row of a matrix."""


@overload(width_of)
def _width_of(columns, operand, like):
    if like.dtype in _FLOATS:
        return lambda columns, operand, like: columns
    if like.dtype == types.int8:
        return lambda columns, operand, like: operand.codes.shape[1]
    return lambda columns, operand, like: operand.codes.shape[1] // 4


@register_jitable
def matrix_at(address, scales_address, rows, columns, operand, like):
    """The matrix at an address, and its scales, bfloat16; without columns if it holds floats."""
    scales = array_at(scales_address, (rows, operand.steps.shape[1]), np.empty(0, np.uint16))
    return array_at(address, (rows, width_of(columns, operand, like)), like), scales


def multiply(first, last, operand, weight, scales, y):
    """Y = operand weight^T, for rows of the weight from first to last."""


@overload(multiply)
def _multiply(first, last, operand, weight, scales, y):
    if weight.dtype in _FLOATS:
        return lambda first, last, operand, weight, scales, y: product(
            first, last, operand.values, weight, None, y
        )
    return lambda first, last, operand, weight, scales, y: quantised_product(
        first, last, operand.codes, operand.steps, weight, scales, None, y
    )
