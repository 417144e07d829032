"""`LANES` complex values, as a Numba type: two Lanes, the real and the imaginary parts.

A kernel that is written with `read`, `write`, the operators, `.real` and `.conjugate()` compiles for real numbers and
for complex ones: Lanes are their own real part and conjugate, as float32 are in Numba.
"""

from __future__ import annotations

import operator
from typing import Any

from numba import float32, types
from numba.core import cgutils
from numba.extending import (
    intrinsic,
    make_attribute_wrapper,
    models,
    overload,
    overload_attribute,
    overload_method,
    register_model,
)

from mambakit.ops.cpu.kernels.lanes import LanesType, lanes_type, load_lanes, store_lanes


class ComplexLanesType(types.Type):
    """Numba's name for the pair."""

    def __init__(self) -> None:
        super().__init__(name="ComplexLanes")


complex_lanes_type = ComplexLanesType()


@register_model(ComplexLanesType)
class _ComplexLanesModel(models.StructModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, [("real", lanes_type), ("imag", lanes_type)])


make_attribute_wrapper(ComplexLanesType, "real", "real")
make_attribute_wrapper(ComplexLanesType, "imag", "imag")


@intrinsic
def complex_lanes(typingctx: Any, real: Any, imag: Any) -> Any:
    """ComplexLanes of two Lanes."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pair = cgutils.create_struct_proxy(sig.return_type)(context, builder)
        pair.real, pair.imag = args
        return pair._getvalue()

    return complex_lanes_type(lanes_type, lanes_type), build


@overload_attribute(LanesType, "real")
def _real(a):
    return lambda a: a


@overload_method(LanesType, "conjugate")
def _same(a):
    return lambda a: a


@overload_method(ComplexLanesType, "conjugate")
def _conjugate(a):
    return lambda a: complex_lanes(a.real, float32(-1) * a.imag)


@overload(operator.add)
def _add(a, b):
    if a == b == complex_lanes_type:
        return lambda a, b: complex_lanes(a.real + b.real, a.imag + b.imag)
    return None


@overload(operator.mul)
def _multiply(a, b):
    """Of two ComplexLanes, or of one and Lanes or float32."""
    reals = (lanes_type, float32)
    if a == b == complex_lanes_type:
        return lambda a, b: complex_lanes(
            a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real
        )
    if a in reals and b == complex_lanes_type:
        return lambda a, b: complex_lanes(a * b.real, a * b.imag)
    if a == complex_lanes_type and b in reals:
        return lambda a, b: complex_lanes(a.real * b, a.imag * b)
    return None


def read(array, index):
    """Lanes at array[index], whose last dimension they are; ComplexLanes if it has two dimensions, (2, LANES)."""


@overload(read, inline="always")
def _read(array, index):
    if array.ndim == len(index) + 1:
        return lambda array, index: load_lanes(array, index)
    return lambda array, index: complex_lanes(
        load_lanes(array, (*index, 0)), load_lanes(array, (*index, 1))
    )


def write(array, index, value):
    """array[index] = value, the inverse of `read`."""


@overload(write, inline="always")
def _write(array, index, value):
    if value == lanes_type:
        return lambda array, index, value: store_lanes(array, index, value)

    def pair(array, index, value):
        store_lanes(array, (*index, 0), value.real)
        store_lanes(array, (*index, 1), value.imag)

    return pair
