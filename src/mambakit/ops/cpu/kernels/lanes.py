"""A vector of `LANES` float32 values as a Numba type, so that a kernel says what stays in registers.

Loops over rows of memory are left to LLVM's own vectoriser, which does them well. The recurrences touch a dozen
arrays in their innermost loop: there it would have to prove that none overlap, and gives up. With explicit vectors

    h = decay * load_lanes(state, (j, n)) + u * B[t, n]

is what it says. `Lanes` add, subtract and multiply with one another and with float32 scalars; a*b+c is contracted to
one rounding. 16 lanes are one AVX-512 register, two of AVX2, four of NEON; LLVM splits them as needed.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import float32, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)


class LanesType(types.Type):
    """Numba's name for the vector."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


lanes_type = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VECTOR)


def _spread(builder: Any, scalar: Any) -> Any:
    """The scalar in every lane."""
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(_INT, 0))
    mask = ir.Constant(_INTS, [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), mask)


def _define(operation: Any, instruction: str) -> None:
    """Let `operation` take two Lanes, or Lanes and a float32."""
    pairs = [(lanes_type, lanes_type), (lanes_type, float32), (float32, lanes_type)]

    @infer_global(operation)
    class _Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if tuple(args) in pairs:
                return signature(lanes_type, *args)
            return None

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vectors = [
            _spread(builder, value) if kind == float32 else value
            for kind, value in zip(sig.args, args, strict=True)
        ]
        return getattr(builder, instruction)(*vectors, flags=("contract",))

    for pair in pairs:
        lower_builtin(operation, *pair)(build)


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
for _operation, _instruction in (
    (operator.iadd, "fadd"),
    (operator.isub, "fsub"),
    (operator.imul, "fmul"),
):
    _define(_operation, _instruction)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Pointer to lane 0 of array[index], whose last dimension is the lanes; no bounds check, no wrap-around."""
    if array_type.layout != "C" or array_type.dtype != float32:
        raise TypeError(f"lanes live in C-contiguous float32 arrays, not in {array_type}")
    data = context.make_array(array_type)(context, builder, array)
    indices = [*cgutils.unpack_tuple(builder, index), ir.Constant(ir.IntType(64), 0)]
    pointer = cgutils.get_item_pointer(
        context, builder, array_type, data, indices, wraparound=False, boundscheck=False
    )
    return builder.bitcast(pointer, _VECTOR.as_pointer())


@intrinsic
def load_lanes(typingctx: Any, array: Any, index: Any) -> Any:
    """array[index] as Lanes; index is a tuple for all dimensions but the last."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, sig.args[0], *args), align=4)

    return lanes_type(array, index), build


def _at(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: Any) -> Any:
    """Pointer to a vector from array[index] on, an index for every dimension; no bounds check, no wrap-around."""
    data = context.make_array(array_type)(context, builder, array)
    indices = cgutils.unpack_tuple(builder, index)
    pointer = cgutils.get_item_pointer(
        context, builder, array_type, data, indices, wraparound=False, boundscheck=False
    )
    return builder.bitcast(pointer, vector.as_pointer())


@intrinsic
def load_floats(typingctx: Any, array: Any, index: Any) -> Any:
    """As many numbers as there are lanes, from array[index] on: float32, neighbours in memory."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_at(context, builder, sig.args[0], *args, _VECTOR), align=4)

    return lanes_type(array, index), build


@intrinsic
def load_bfloat16(typingctx: Any, array: Any, index: Any) -> Any:
    """As `load_floats`, of bfloat16 (uint16)."""
    narrow = ir.VectorType(ir.IntType(16), LANES)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.load(_at(context, builder, sig.args[0], *args, narrow), align=2)
        wide = builder.shl(builder.zext(bits, _INTS), ir.Constant(_INTS, [16] * LANES))
        return builder.bitcast(wide, _VECTOR)

    return lanes_type(array, index), build


@intrinsic
def store_lanes(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, index, value = args
        builder.store(value, _address(context, builder, sig.args[0], array, index), align=4)
        return context.get_dummy_value()

    return types.void(array, index, lanes_type), build


@intrinsic
def store_floats(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write what `load_floats` reads."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, index, value = args
        pointer = _at(context, builder, sig.args[0], array, index, _VECTOR)
        builder.store(value, pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, index, lanes_type), build


@intrinsic
def spread(typingctx: Any, scalar: Any) -> Any:
    """Lanes that all hold the float32 scalar."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _spread(builder, args[0])

    return lanes_type(float32), build


@intrinsic
def sum_lanes(typingctx: Any, value: Any) -> Any:
    """The sum over the lanes, halving: lane i + lane i + 8, then 4, 2, 1."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total = args[0]
        for half in (8, 4, 2, 1):
            low, high = (
                builder.shuffle_vector(
                    total,
                    total,
                    ir.Constant(ir.VectorType(_INT, half), list(range(start, start + half))),
                )
                for start in (0, half)
            )
            total = builder.fadd(low, high)
        return builder.extract_element(total, ir.Constant(_INT, 0))

    return float32(lanes_type), build


@intrinsic
def clamp(typingctx: Any, x: Any, low: Any, high: Any) -> Any:
    """Low where x < low, high where x > high, else x (NaN too); x float32 or Lanes, the bounds float32."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, *bounds = args
        for bound, outside in zip(bounds, "<>", strict=True):
            limit = _spread(builder, bound) if sig.args[0] == lanes_type else bound
            value = builder.select(builder.fcmp_ordered(outside, value, limit), limit, value)
        return value

    return x(x, float32, float32), build


@intrinsic
def scale_exponent(typingctx: Any, p: Any, k: Any) -> Any:
    """P times two to the integer in the low mantissa bits of k: an addition to the exponent; float32 or Lanes."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        floats, ints, constant = _kind(sig.args[0])
        bits, exponent = (builder.bitcast(a, ints) for a in args)
        return builder.bitcast(builder.add(bits, builder.shl(exponent, constant(23))), floats)

    return p(p, p), build


@intrinsic
def quarter_turns(typingctx: Any, cos: Any, sin: Any, k: Any) -> Any:
    """(cos, sin) of the angle plus k quarter turns, k in the low mantissa bits; float32 or Lanes.

    An odd k swaps the two. The second bit of k is the sign of the sine, that of k + 1 the sign of the cosine.
    """

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        floats, ints, constant = _kind(sig.args[0])
        cos, sin, turns = (builder.bitcast(a, ints) for a in args)
        swap = builder.icmp_signed("!=", builder.and_(turns, constant(1)), constant(0))

        def signed(bits: Any, count: Any) -> Any:
            sign = builder.shl(builder.and_(count, constant(2)), constant(30))
            return builder.bitcast(builder.xor(bits, sign), floats)

        turned = (
            signed(builder.select(swap, sin, cos), builder.add(turns, constant(1))),
            signed(builder.select(swap, cos, sin), turns),
        )
        return context.make_tuple(builder, sig.return_type, turned)

    return types.UniTuple(cos, 2)(cos, cos, cos), build


def _kind(number: Any) -> tuple[Any, Any, Any]:
    """For float32 or Lanes: the LLVM type, that of its bits, and how to write a constant of these."""
    if number == lanes_type:
        return _VECTOR, _INTS, lambda value: ir.Constant(_INTS, [value] * LANES)
    return _FLOAT, _INT, lambda value: ir.Constant(_INT, value)
