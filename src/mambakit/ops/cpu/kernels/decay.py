"""How much of a state is left after a step: the one function of A that all scans share."""

from __future__ import annotations

from numba import types
from numba.extending import overload

from mambakit.ops.cpu.kernels.complex_lanes import ComplexLanesType, complex_lanes
from mambakit.ops.cpu.kernels.simd import LOG2_E, cos_sin, exp2


def decay(dt, A):
    """exp(dt A); dt Lanes or float32, A the same or its complex counterpart."""


@overload(decay)
def _decay(dt, A):
    if not isinstance(A, (types.Complex, ComplexLanesType)):
        return lambda dt, A: exp2(dt * LOG2_E * A)
    number = complex if isinstance(A, types.Complex) else complex_lanes

    def turning(dt, A):
        size = exp2(dt * LOG2_E * A.real)
        cos, sin = cos_sin(dt * A.imag)
        return number(size * cos, size * sin)

    return turning
