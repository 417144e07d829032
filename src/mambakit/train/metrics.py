"""What a run records of itself: log.jsonl, TensorBoard events, loss.png; and the machine's peak."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from mambakit.files import atomic_write
from mambakit.models.language_model import MambaLanguageModel
from mambakit.train import run_folder
from mambakit.train.config import TrainConfig
from mambakit.train.distributed import World


class RunLog:
    """The log of a run folder. Resuming drops what was logged after the checkpoint."""

    def __init__(self, run: Path, step: int) -> None:
        """Open the log.

        Args:
            run: Run folder.
            step: Steps done by the checkpoint that the run goes on from; 0 for a new run.
        """
        self._path = run / run_folder.LOG
        self._picture = run / run_folder.PICTURE
        self.records = [record for record in read_log(self._path) if record["step"] <= step]
        with atomic_write(self._path) as partial:
            partial.write_text("".join(map(_line, self.records)), encoding="utf-8")
        self._events = SummaryWriter(str(run / run_folder.EVENTS), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Append a record: metrics, whose names carry their units, or texts, such as samples."""
        self.records.append({"step": step, **values})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(self.records[-1]))
        for name, value in values.items():
            add = self._events.add_text if isinstance(value, str) else self._events.add_scalar
            add(name, value, step)

    def draw(self) -> None:
        """Draw the training and validation loss over the steps as loss.png."""
        # Not at the top: it takes a second that a short run can do without until here.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), dpi=120)
        axes = figure.subplots()
        for name, label, style in _CURVES:
            points = [(r["step"], r[name]) for r in self.records if name in r]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        with atomic_write(self._picture) as partial:
            figure.savefig(partial)

    def close(self) -> None:
        """Write out the TensorBoard events."""
        self._events.close()


_CURVES = (("train_loss_nats", "training", "-"), ("valid_loss_nats", "validation", "o-"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read log.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


class Throughput:
    """Measures how fast a run goes: a context around each step, and `measure` now and then.

    Model FLOP utilisation is the share of the device's measured matrix product rate that the
    model's own operations use, forward and backward, without those that are done twice.
    """

    def __init__(self, model: MambaLanguageModel, config: TrainConfig, world: World) -> None:
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self._tokens_per_step = config.batch_size * config.accumulation * config.seqlen * world.size
        self._world = world
        self._flops_per_token = model.flops_per_token(config.seqlen)
        self._peak = measure_matmul_flops(world.device, dtype) * world.size
        self._seconds = 0.0
        self._steps = 0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._start
        self._steps += 1

    def measure(self, step: int) -> dict[str, float]:
        """The rates of the steps since the last call; `step` is the number of steps done."""
        seconds = self._seconds / self._steps
        rate = self._tokens_per_step / seconds
        self._seconds, self._steps = 0.0, 0
        values = {
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "model_flop_utilisation": rate * self._flops_per_token / self._peak,
        }
        if self._world.device.type == "cuda":
            values["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self._world.device)
        return values


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best matrix product rate of this device, in FLOP/s: the peak of the utilisation.

    Takes about a tenth of a second. Two cores do not need the large matrices that a GPU does.
    """
    size = 8192 if device.type == "cuda" else 1024
    left = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
