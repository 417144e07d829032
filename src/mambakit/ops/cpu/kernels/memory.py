"""Arrays at an address, and counters that threads share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, int64, types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable
from numba.np.numpy_support import as_dtype


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(int64), build


@register_jitable
def floats(address, shape):
    """The contiguous float32 array of this shape (a tuple) that lies at an address."""
    return carray(_pointer(address), shape, dtype=np.float32)


def array_at(address, shape, like):
    """The contiguous array of this shape (a tuple), and of the dtype of `like`, that lies at an address."""


@overload(array_at)
def _array_at(address, shape, like):
    dtype = as_dtype(like.dtype)
    return lambda address, shape, like: carray(_pointer(address), shape, dtype=dtype)


def _counter(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    data = context.make_array(sig.args[0])(context, builder, args[0])
    indices = [args[1]]
    return cgutils.get_item_pointer(
        context, builder, sig.args[0], data, indices, wraparound=False, boundscheck=False
    )


@intrinsic
def count(typingctx: Any, counters: Any, index: Any, number: Any) -> Any:
    """Add a number to counters[index] (int64), whatever other threads do; what it was before."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        *place, number = args
        return builder.atomic_rmw("add", _counter(context, builder, sig, place), number, "acq_rel")

    return int64(counters, index, int64), build


@intrinsic
def counted(typingctx: Any, counters: Any, index: Any) -> Any:
    """counters[index] (int64) as other threads see it; what they wrote before they counted is there."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_counter(context, builder, sig, args), "acquire", align=8)

    return int64(counters, index), build
