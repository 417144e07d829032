"""What the benchmark scripts share: medians with their spread, the environment, tables and JSON files."""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mambakit


@dataclass(frozen=True)
class Measurement:
    """A median, and the half width of the middle half of the samples relative to it."""

    median: float
    spread: float

    @staticmethod
    def of(samples: list[float]) -> Measurement:
        middle = statistics.median(samples)
        low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (middle,) * 3
        return Measurement(middle, (high - low) / 2 / middle)

    def rate(self, amount: float) -> Measurement:
        """Seconds turned into amount per second."""
        return Measurement(amount / self.median, self.spread)


def measure(function: Callable[[], Any], repeats: int, warmups: int = 1) -> Measurement:
    """Seconds a call takes."""
    for _ in range(warmups):
        function()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return Measurement.of(samples)


def forward_and_backward(
    op: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor], backend: str, repeats: int
) -> tuple[Measurement, Measurement]:
    """Seconds of the forward (recording for the backward) and of the backward, after one warm-up."""
    forward, backward = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        y = op(**inputs, backend=backend)[0]
        done = time.perf_counter()
        y.backward(torch.ones_like(y))
        forward.append(done - start)
        backward.append(time.perf_counter() - done)
        for tensor in inputs.values():
            tensor.grad = None
    return Measurement.of(forward[1:]), Measurement.of(backward[1:])


def environment() -> dict[str, Any]:
    """What a number depends on: date, commit, device, versions, threads."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip() or "unknown",
        "mambakit": mambakit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table, the first column to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}")
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
