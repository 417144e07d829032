"""The only place that chooses a backend.

An explicit `backend=` wins: if it cannot run the call, `BackendError` says why and what to do. `"auto"` takes the first
of `BACKENDS` that can, and `explain` tells which and why (`mambakit doctor` prints it).
"""

from __future__ import annotations

import importlib.util
from typing import Literal, NamedTuple

import torch

from mambakit.errors import BackendError

Backend = Literal["auto", "reference", "cpu"]

BACKENDS = ("cpu", "reference")
"""In order of preference."""

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)


class Choice(NamedTuple):
    """One backend for one call: why it cannot run, or None if it can."""

    backend: str
    unavailable: str | None


def unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run on tensors of this device and dtype; None if it can."""
    if backend == "reference":
        return None
    if device.type != "cpu":
        return f"the tensors are on {device}; move them with .cpu(), or use backend='reference'"
    if dtype not in CPU_DTYPES:
        remedy = "complex64" if dtype.is_complex else "float32"
        return f"no compiled kernel for {dtype}; use {remedy}, or backend='reference'"
    if importlib.util.find_spec("numba") is None:
        return "the package numba is not installed; pip install numba"
    return None


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that will run: `backend` itself, or for "auto" the fastest that can.

    Raises:
        BackendError: The name is unknown, or the named backend cannot run this call here.
    """
    if backend == "auto":
        return next(c.backend for c in explain(device, dtype) if c.unavailable is None)
    if backend not in BACKENDS:
        raise BackendError(f"backend: got {backend!r}, wanted 'auto' or one of {BACKENDS}")
    reason = unavailable(backend, device, dtype)
    if reason is not None:
        raise BackendError(f"backend {backend!r} cannot run here: {reason}")
    return backend


def explain(device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """Every backend in order of preference, each with the reason why it cannot run, if any."""
    return [Choice(name, unavailable(name, device, dtype)) for name in BACKENDS]
