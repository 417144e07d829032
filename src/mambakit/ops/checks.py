"""Argument checks shared by the ops: every message names the argument, what it got and what it wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambakit.errors import ArgumentError, DtypeError, ShapeError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_shape(name: str, tensor: Tensor | None, *allowed: Sequence[int], letters: str) -> None:
    """Raise `ShapeError` unless the shape is one of `allowed`; `letters` says what they mean."""
    if tensor is None or any(tuple(tensor.shape) == tuple(shape) for shape in allowed):
        return
    wanted = " or ".join(str(tuple(shape)) for shape in allowed)
    raise ShapeError(f"{name}: got shape {tuple(tensor.shape)}, wanted {letters} = {wanted}")


def check_rank(name: str, tensor: Tensor, rank: int, letters: str) -> None:
    """Raise `ShapeError` unless the tensor has `rank` dimensions."""
    if tensor.ndim != rank:
        raise ShapeError(f"{name}: got shape {tuple(tensor.shape)}, wanted {letters}")


def check_float(*, complex_allowed: bool = False, **tensors: Tensor | None) -> None:
    """Raise `DtypeError` unless every given tensor has a floating point dtype."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.dtype in FLOATS or (complex_allowed and tensor.is_complex()):
            continue
        kind = "floating point or complex" if complex_allowed else "floating point"
        raise DtypeError(f"{name}: got dtype {tensor.dtype}, wanted a {kind} dtype")


def check_integer(**tensors: Tensor | None) -> None:
    """Raise `DtypeError` unless every given tensor is int32 or int64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"{name}: got dtype {tensor.dtype}, wanted int32 or int64")


def check_device(like: Tensor, **tensors: Tensor | None) -> None:
    """Raise `ArgumentError` unless every given tensor is on the device of `like`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ArgumentError(f"{name}: is on {tensor.device}, wanted {like.device} like x")


def check_in_place(name: str, state: Tensor, dtype: torch.dtype, *inputs: Tensor | None) -> None:
    """Raise unless `state` has `dtype` and no gradient is asked of an in-place step."""
    if state.dtype != dtype:
        raise DtypeError(f"{name}: got dtype {state.dtype}, wanted {dtype}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise ArgumentError(
            f"{name}: a step updates its state in place and has no gradient; call it under "
            "torch.no_grad(), or use the whole-sequence function with a length of 1"
        )
