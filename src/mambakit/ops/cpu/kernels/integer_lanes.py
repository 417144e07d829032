"""Vectors of integer products, for codes of eight or four bits and numbers of sixteen.

x86 multiplies sixteen pairs of 16-bit integers and adds neighbours in one instruction (`pmaddwd`), twice as many as a
float32 multiply-add does, and a code takes one instruction to widen instead of two. LLVM knows the instruction by what
`_add_products` writes; other processors get what they have.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import float32, int8, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

_I32 = ir.IntType(32)
_SUMS, _PRODUCTS = ir.VectorType(_I32, 8), ir.VectorType(_I32, 16)
_TOTALS = ir.VectorType(ir.FloatType(), 8)
_BYTES, _WORDS = ir.VectorType(ir.IntType(8), 16), ir.VectorType(ir.IntType(16), 16)


class SumsType(types.Type):
    """Numba's name for eight int32 sums."""

    def __init__(self) -> None:
        super().__init__(name="Sums")


class TotalsType(types.Type):
    """Numba's name for eight float32 totals."""

    def __init__(self) -> None:
        super().__init__(name="Totals")


sums_type, totals_type = SumsType(), TotalsType()


@register_model(SumsType)
class _SumsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _SUMS)


@register_model(TotalsType)
class _TotalsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _TOTALS)


@intrinsic
def no_sums(typingctx: Any) -> Any:
    """Eight integer zeros."""
    return sums_type(), lambda context, builder, sig, args: ir.Constant(_SUMS, [0] * 8)


@intrinsic
def no_totals(typingctx: Any) -> Any:
    """Eight float32 zeros."""
    return totals_type(), lambda context, builder, sig, args: ir.Constant(_TOTALS, [0.0] * 8)


@intrinsic
def add_scaled(typingctx: Any, totals: Any, sums: Any, scale: Any) -> Any:
    """Totals + scale * sums."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        totals, sums, scale = args
        undefined, zero = ir.Constant(_TOTALS, ir.Undefined), ir.Constant(_I32, 0)
        one = builder.insert_element(undefined, scale, zero)
        everywhere = builder.shuffle_vector(one, undefined, ir.Constant(_SUMS, [0] * 8))
        flags = ("contract",)
        scaled = builder.fmul(builder.sitofp(sums, _TOTALS), everywhere, flags=flags)
        return builder.fadd(totals, scaled, flags=flags)

    return totals_type(totals, sums, float32), build


@intrinsic
def sum_totals(typingctx: Any, totals: Any) -> Any:
    """The sum of the eight, halving: i + (i + 4), then 2, 1."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total = args[0]
        for half in (4, 2, 1):
            mask = ir.VectorType(_I32, half)
            low, high = (
                builder.shuffle_vector(
                    total, total, ir.Constant(mask, list(range(start, start + half)))
                )
                for start in (0, half)
            )
            total = builder.fadd(low, high)
        return builder.extract_element(total, ir.Constant(_I32, 0))

    return float32(totals), build


def _add_codes(sixteens: range) -> Any:
    """Adds the products of some codes of a block to the sums; see `add_block`."""

    @intrinsic
    def add(typingctx: Any, sums: Any, codes: Any, place: Any, x: Any, start: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            total, codes, place, x, start = args
            codes = _pointer(context, builder, sig.args[1], codes, place)
            x = _pointer(context, builder, sig.args[3], x, start)
            for sixteen in sixteens:
                if sig.args[1].dtype == int8:
                    narrow = _load(builder, codes, 16 * sixteen, _BYTES)
                    widened = builder.sext(narrow, _WORDS)
                else:
                    widened = _nibbles(builder, _load(builder, codes, 0, _WORDS), sixteen)
                factors = _load(builder, x, 16 * sixteen, _WORDS)
                total = _add_products(builder, total, widened, factors)
            return total

        return sums_type(sums, codes, place, x, start), build

    return add


add_block, first_half, second_half = map(_add_codes, (range(4), range(2), range(2, 4)))
"""add_block(sums, codes, place, x, start): sums + products of the 64 codes of a block with x (int16).

place, start: indices, as tuples, of what belongs to code 0 of the block. The halves take 32 codes each.
"""


def _nibbles(builder: Any, words: Any, k: int) -> Any:
    """Bits 4k to 4k + 3 of each word, with their sign."""
    if k < 3:
        words = builder.shl(words, ir.Constant(_WORDS, [12 - 4 * k] * 16))
    return builder.ashr(words, ir.Constant(_WORDS, [12] * 16))


def _add_products(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """Sums + the products of neighbours, even and odd, added in pairs; int16 times int16 in int32."""
    products = builder.mul(builder.sext(a, _PRODUCTS), builder.sext(b, _PRODUCTS))
    even, odd = (
        builder.shuffle_vector(products, products, ir.Constant(_SUMS, list(range(first, 16, 2))))
        for first in (0, 1)
    )
    return builder.add(sums, builder.add(even, odd))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Address of array[index], an index for every dimension; no bounds check, no wrap-around."""
    data = context.make_array(array_type)(context, builder, array)
    indices = cgutils.unpack_tuple(builder, index)
    return cgutils.get_item_pointer(
        context, builder, array_type, data, indices, wraparound=False, boundscheck=False
    )


def _load(builder: Any, pointer: Any, offset: int, vector: Any) -> Any:
    """Sixteen numbers from so many after the pointer."""
    start = builder.gep(pointer, [ir.Constant(_I32, offset)])
    align = vector.element.width // 8
    return builder.load(builder.bitcast(start, vector.as_pointer()), align=align)
