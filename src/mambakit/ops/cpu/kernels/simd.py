"""Scalar functions that LLVM turns into vector code in a loop over a row: no library calls, no branches, float32.

`exp2` and `cos_sin` take `Lanes` too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, njit, types, uint16
from numba.extending import intrinsic, overload, register_jitable

from mambakit.ops.cpu.kernels.lanes import clamp, quarter_turns, scale_exponent

LOG2_E = np.float32(1.4426950408889634)
LN_2 = np.float32(0.693145751953125)  # the first 15 bits of ln 2
LN_2_REST = np.float32(0.6931471805599453 - 0.693145751953125)
TWO_OVER_PI = np.float32(0.6366197723675814)
HALF_PI = np.float32(1.57080078125)  # the first 12 bits of pi/2, rounded up
HALF_PI_REST = np.float32(1.5707963267948966 - 1.57080078125)
ROUND = np.float32(1.5 * 2**23)
"""Adding it leaves no bit for a fraction, so the sum is rounded to an integer, held in the low mantissa bits."""

_I16, _I32 = ir.IntType(16), ir.IntType(32)


def _digest_of_sources() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]


_DIGEST = _digest_of_sources()


def kernel(function: Any) -> Any:
    """Compile without the GIL, a*b+c contracted to one rounding, the machine code cached on disk.

    Numba looks for a change only in the file of the function itself, but the code of its neighbours is compiled into
    it. So their digest is part of the name under which it is cached.
    """
    function.__qualname__ += f"_{_DIGEST}"
    return njit(function, nogil=True, fastmath={"contract"}, error_model="numpy", cache=True)


def any_order(function: Any) -> Any:
    """Compile a part of a kernel in which the compiler may choose the order of sums, once, as it compiles.

    Or it could not vectorise them. Not cached on its own: its code is in that of the kernels.
    """
    flags = {"contract", "reassoc", "nsz"}
    return njit(function, nogil=True, fastmath=flags, error_model="numpy")


@register_jitable
def exp2(x: float) -> float:
    """2^x to 1 ulp: x = k + f with |f| <= 1/2, a polynomial for 2^f, and k into the exponent.

    x is clamped to [-126, 128]: below, 2^-126 stands for zero; above, the result is infinite. NaN stays NaN.
    """
    x = clamp(x, np.float32(-126.0), np.float32(128.0))
    k = x + ROUND
    f = x - (k - ROUND)
    p = f * np.float32(1.5345812e-04) + np.float32(1.3399931e-03)
    p = p * f + np.float32(9.6184891e-03)
    p = p * f + np.float32(5.5503286e-02)
    p = p * f + np.float32(2.4022646e-01)
    p = p * f + np.float32(6.9314718e-01)
    p = p * f + np.float32(1.0)
    return scale_exponent(p, k)


@register_jitable
def exp(x: float) -> float:
    """e^x to 1 ulp for x in [-87, 88], to which it is clamped; NaN stays NaN.

    As `exp2`, with x = k ln 2 + f. The multiple of ln 2 is taken off in two parts, the first exact, so that nothing is
    lost for large x.
    """
    x = clamp(x, np.float32(-87.0), np.float32(88.0))
    k = x * LOG2_E + ROUND
    n = k - ROUND
    f = x - n * LN_2 - n * LN_2_REST
    p = f * np.float32(1.3836846e-03) + np.float32(8.3748158e-03)
    p = p * f + np.float32(4.1668225e-02)
    p = p * f + np.float32(1.6666420e-01)
    p = p * f + np.float32(4.9999991e-01)
    p = p * f + np.float32(1.0)
    p = p * f + np.float32(1.0)
    return scale_exponent(p, k)


@register_jitable
def cos_sin(x: float) -> tuple[float, float]:
    """(cos x, sin x) to 1.5 * 2^-24: x = k pi/2 + f with |f| <= pi/4, polynomials in f, and k quarter turns.

    The multiple of pi/2 is taken off in two parts, the first exact up to |x| = 6400, and up to 10^5 where the machine
    has a fused multiply-add. x is clamped to +-2^22, where neighbouring float32 are half a radian apart. NaN stays NaN.
    """
    x = clamp(x, np.float32(-(2.0**22)), np.float32(2.0**22))
    k = x * TWO_OVER_PI + ROUND
    n = k - ROUND
    f = x - n * HALF_PI - n * HALF_PI_REST
    q = f * f
    cos = q * np.float32(2.4430663e-05) + np.float32(-1.3887301e-03)
    cos = cos * q + np.float32(4.1666646e-02)
    cos = cos * q + np.float32(-0.5)
    cos = cos * q + np.float32(1.0)
    sin = q * np.float32(-1.9495003e-04) + np.float32(8.3319778e-03)
    sin = sin * q + np.float32(-1.6666651e-01)
    sin = sin * q * f + f
    return quarter_turns(cos, sin, k)


@register_jitable
def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return np.float32(1.0) / (np.float32(1.0) + exp(-x))


@register_jitable
def softplus(x: float) -> float:
    """ln(1 + e^x) = max(x, 0) + ln(1 + w) with w = e^-|x|, to a few ulp also where it is tiny.

    ln(1 + w) = 2 artanh(s) with s = w / (2 + w) <= 1/3: 2 s, and a small rest with a polynomial in s^2.
    """
    w = exp(-abs(x))
    s = w / (np.float32(2.0) + w)
    q = s * s
    p = np.float32(1.40891671e-01)
    p = p * q + np.float32(1.39803022e-01)
    p = p * q + np.float32(2.00124547e-01)
    p = p * q + np.float32(3.33331585e-01)
    positive = x if x > np.float32(0.0) else np.float32(0.0)
    twice = s + s
    return positive + (p * q * twice + twice)


@any_order
def dot(a, b):
    """Real part of the sum of a b."""
    total = np.float32(0)
    for i in range(a.size):
        total += (load(a, i) * load(b, i)).real
    return total


@register_jitable
def flush(sums, totals):
    """Add float32 sums to float64 totals and start them afresh: long sums lose nothing, short ones stay fast."""
    for i in range(totals.size):
        totals[i] += sums[i]
        sums[i] = np.float32(0)


@intrinsic
def _from_bfloat16(typingctx: Any, bits: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(wide, ir.FloatType())

    return float32(uint16), build


@intrinsic
def _to_bfloat16(typingctx: Any, value: Any) -> Any:
    """Round to nearest, ties to even; a NaN must not carry over into the exponent."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def constant(value: int) -> Any:
            return ir.Constant(_I32, value)

        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.add(builder.add(bits, constant(0x7FFF)), odd)
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        chosen = builder.select(is_nan, constant(0x7FC00000), rounded)
        return builder.trunc(builder.lshr(chosen, constant(16)), _I16)

    return uint16(float32), build


def load(row, i):
    """row[i] as float32; uint16 rows hold the bits of bfloat16."""


@overload(load, inline="always")
def _load(row, i):
    if row.dtype == types.uint16:
        return lambda row, i: _from_bfloat16(row[i])
    return lambda row, i: row[i]


def store(row, i, value):
    """row[i] = value, rounded to bfloat16 where the row is uint16."""


@overload(store, inline="always")
def _store(row, i, value):
    if row.dtype == types.uint16:

        def narrow(row, i, value):
            row[i] = _to_bfloat16(value)

        return narrow

    def plain(row, i, value):
        row[i] = value

    return plain
