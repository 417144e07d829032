"""What the GPU benchmarks share: times from CUDA events, buffers in rotation, ceilings of the device, tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from report import Measurement, environment, save

SLEEP = 3_000_000
"""Clock cycles (1.5 ms) that the GPU waits before each timed call, so that the launches are queued when it starts."""


def gpu_environment(commit: str | None = None) -> dict[str, Any]:
    """`report.environment`, and the GPU with its ceilings measured here and now.

    Args:
        commit: Where the script runs without the repository's history, the commit it is at.
    """
    gpu = torch.cuda.get_device_properties(0)
    known = environment()
    return {
        **known,
        "commit": commit or known["commit"],
        "cuda": torch.version.cuda,
        "gpu": gpu.name,
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
        "multiprocessors": gpu.multi_processor_count,
        "copy_gb_per_s": round(copy_bandwidth() / 1e9),
        "matmul_tflop_per_s": round(matmul_rate() / 1e12),
    }


def time_calls(
    calls: Sequence[Callable[[], Any]], *, seconds: float = 0.4, most: int = 50
) -> Measurement:
    """Seconds that the GPU takes for a call.

    Args:
        calls: The same work on different buffers, taken in turn; see `rotation`.
        seconds: Time to spend, about; a slow call is measured once.
        most: Samples at most.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    turns = cycle(calls)

    def sample() -> float:
        call = next(turns)
        torch.cuda._sleep(SLEEP)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    sample()  # Compiles, allocates.
    once = sample()
    if once > seconds:
        return Measurement.of([once])
    for call in calls:
        call()
    count = min(most, max(3, int(seconds / max(once, 1e-3))))
    return Measurement.of([sample() for _ in range(count)])


def rotation(num_bytes: int, most: int = 24) -> int:
    """How many sets of buffers of this size are needed that none is in the L2 cache when its turn comes again."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(most, -(-3 * cache // max(num_bytes, 1))))


def size(*tensors: Tensor) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of the device's own copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return time_calls([lambda: target.copy_(source)]).rate(2 * 2**30).median


def matmul_rate(width: int = 8192) -> float:
    """Floating point operations a second of a bfloat16 product of square matrices."""
    a, b = torch.randn(2, width, width, device="cuda", dtype=torch.bfloat16)
    return time_calls([lambda: a @ b]).rate(2 * width**3).median


def merge(path: Path, environment: dict[str, Any], rows: list[dict[str, Any]], key: str) -> None:
    """Write rows to a JSON file, in place of its rows with the same `key`.

    Rows of another commit, device or set of versions go: only numbers of one state of things stand in one file.
    """
    same = ("commit", "gpu", "torch", "cuda", "mambakit")
    old: list[dict[str, Any]] = []
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(found["environment"].get(name) == environment[name] for name in same):
            old = found["rows"]
    new = {row[key] for row in rows}
    kept = [row for row in old if row[key] not in new]
    save(path, {"environment": environment, "rows": [*kept, *rows]})
