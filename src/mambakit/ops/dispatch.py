"""The only place that chooses a backend.

An explicit `backend=` wins: if it cannot run the call, `BackendError` says why and what to do. `"auto"` takes the first
of `BACKENDS` that can, and `explain` tells which and why (`mambakit doctor` prints it).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from mambakit.errors import BackendError
from mambakit.ops import cpu, cuda, reference

Backend = Literal["auto", "reference", "cpu", "cuda"]

BACKENDS = ("cpu", "cuda", "reference")
"""In order of preference."""

_FOLDERS: dict[str, Any] = {"cpu": cpu, "cuda": cuda, "reference": reference}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
"""Of the compiled kernels, on the CPU and on the GPU."""


class Choice(NamedTuple):
    """One backend for one call: why it cannot run, or None if it can."""

    backend: str
    unavailable: str | None


def implementation(
    op: str, backend: str, device: torch.device, dtype: torch.dtype
) -> Callable[..., Any]:
    """The function of the backend that will run an op; its arguments are those of the public one, by position.

    Args:
        op: Name of the op.
        backend: What the caller asked for.
        device: Of the tensors.
        dtype: In which the kernels read or compute.

    Raises:
        BackendError: As `resolve_backend`.
    """
    folder = _FOLDERS[resolve_backend(backend, device, dtype)]
    function: Callable[..., Any] = getattr(getattr(folder, folder.FILES[op]), op)
    return function


def unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run on tensors of this device and dtype; None if it can."""
    if backend == "reference":
        return None
    if backend != device.type:
        if backend == "cuda" and not torch.cuda.is_available():
            return "PyTorch finds no NVIDIA GPU; use backend='cpu' or 'reference'"
        return (
            f"the tensors are on {device}; move them with .{backend}(), or use backend='reference'"
        )
    if dtype not in DTYPES:
        remedy = "complex64" if dtype.is_complex else "float32"
        return f"no compiled kernel for {dtype}; use {remedy}, or backend='reference'"
    if backend == "cpu":
        if not _HAS_NUMBA:
            return "the package numba is not installed; pip install numba"
        return None
    if torch.compiler.is_compiling():  # Dynamo looks through caches, and complains.
        return _gpu_unavailable(device)
    return _gpu_unavailable_cached(device)


def _gpu_unavailable(device: torch.device) -> str | None:
    """Why no kernel of ours runs on this GPU."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA; use backend='reference'"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU; use backend='cpu' or 'reference'"
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major < 8:
        return (
            f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}, and the kernels need 8.0 or higher; "
            "use backend='reference'"
        )
    if not _HAS_CUDA_CORE:
        return "the package cuda-core is not installed; pip install cuda-core"
    return None


_gpu_unavailable_cached = functools.lru_cache(maxsize=None)(_gpu_unavailable)


def _has_cuda_core() -> bool:
    # find_spec of a module in a package imports the package, and raises if there is none.
    return (
        importlib.util.find_spec("cuda") is not None
        and importlib.util.find_spec("cuda.core") is not None
    )


# Once, when imported: Dynamo does not look into find_spec.
_HAS_NUMBA = importlib.util.find_spec("numba") is not None
_HAS_CUDA_CORE = _has_cuda_core()


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
