"""How fast a run would be on this machine, before its number of steps is chosen."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from mambakit.train.callbacks import Callback
from mambakit.train.config import TrainConfig
from mambakit.train.trainer import Trainer

WARM_UP = 2
"""Steps that compile and fill caches; not counted."""


def seconds_per_step(config: TrainConfig, steps: int = 8) -> float:
    """Median time of an optimizer step, from a short trial run that leaves nothing behind."""
    times: list[float] = []

    class Clock(Callback):
        def on_step(self, trainer: Trainer, loss: float) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        trial = dataclasses.replace(
            config, out=Path(scratch), steps=steps, log_every=steps, valid_tokens=1
        )
        if Trainer(trial, callbacks=[Clock()]).fit().signal is not None:
            raise KeyboardInterrupt
    return statistics.median(b - a for a, b in pairwise(times[WARM_UP:]))
