"""`mambakit doctor`: what this machine can run, which backend every op gets, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mambakit import __version__
from mambakit.cli.parsing import parse

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = (
    "torch",
    "numba",
    "cuda-core",
    "cuda-bindings",
    "numpy",
    "safetensors",
    "tokenizers",
    "datasets",
    "huggingface-hub",
    "tensorboard",
)
DTYPES = ("float32", "bfloat16", "float16", "float64", "complex64")


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Show what this machine can run, which backend every op gets, and why."""


def run(args: Sequence[str]) -> int:
    """Run `mambakit doctor`."""
    parse(Doctor, args, "doctor")

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in (*_software(), *_hardware(), *_caches()):
        facts.add_row(name, escape(value))
    console = Console()
    console.print(facts)
    console.print(_backends())
    return 0


def _software() -> Iterator[tuple[str, str]]:
    yield "mambakit", f"{__version__} in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "system", platform.platform()
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is missing"


def _hardware() -> Iterator[tuple[str, str]]:
    import llvmlite.binding
    import torch

    from mambakit.ops.cpu import features
    from mambakit.train.memory import device_memory

    found = ", ".join(name for name in features.KNOWN if name in features.features())
    yield "cpu", f"{llvmlite.binding.get_host_cpu_name()} with {found or 'no SIMD'}"
    reason = features.slow_bfloat16()
    yield "bfloat16", f"no: {reason}; use float32" if reason else "no reason against it on this CPU"
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()}; OMP_NUM_THREADS sets them"
    memory = device_memory(torch.device("cpu"))
    yield "memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}",
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}",
        )
    if not torch.cuda.is_available():
        built = "has no CUDA" if torch.version.cuda is None else "finds no GPU or no driver"
        yield "gpu", f"none: PyTorch {torch.__version__} {built}"


def _caches() -> Iterator[tuple[str, str]]:
    """Where compiled kernels and downloads are kept, and whether they can be."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from mambakit.ops.cpu.kernels import selective_scan
    from mambakit.ops.cuda import binaries

    yield "kernel cache", _access(Path(selective_scan.forward.stats.cache_path))
    yield "cuda cache", _access(binaries.folder())
    yield "hub cache", _access(Path(HF_HUB_CACHE))


def _access(folder: Path) -> str:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return f"{folder} ({'writable' if os.access(there, os.W_OK) else 'NOT writable'})"


def _backends() -> Table:
    """What `backend="auto"` picks for tensors of each device and dtype, and why not another."""
    import torch
    from rich.table import Table

    from mambakit import ops
    from mambakit.ops.dispatch import explain

    table = Table(
        "device", "dtype", "auto picks", "and not", title=f"backend of {', '.join(ops.__all__)}"
    )
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        for dtype in DTYPES:
            choices = explain(torch.device(device), getattr(torch, dtype))
            picked = next(choice.backend for choice in choices if choice.unavailable is None)
            others = [
                f"{choice.backend}: {choice.unavailable or 'slower'}"
                for choice in choices
                if choice.backend != picked
            ]
            table.add_row(device, dtype, picked, "\n".join(others))
    return table
