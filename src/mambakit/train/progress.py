"""Progress of a run: a live bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mambakit.train.callbacks import Callback

if TYPE_CHECKING:
    from mambakit.train.trainer import Trainer

PLAIN_SECONDS = 10.0
"""Least time between two lines where there is no terminal."""


class Progress(Callback):
    """Shows the loss, tokens per second and the time left.

    Args:
        console: Where to show it. Default: stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._speed = ""
        self._next_line = 0.0
        self._bar = Bar(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            expand=True,
        )

    def on_start(self, trainer: Trainer) -> None:
        """Say what begins, and show the bar."""
        config, size = trainer.config, f"{trainer.model.num_parameters() / 1e6:.2f} M"
        if trainer.adapter is not None:
            trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            size = f"{trained / 1e6:.2f} M of {size}"
        self._say(
            f"training {size} parameters on {trainer.world.device} in "
            f"{config.precision}; run folder: {config.out}"
        )
        if trainer.step:
            changes = f" with {', '.join(trainer.changes)}" if trainer.changes else ""
            self._say(f"going on from step {trainer.step}{changes}")
        self._task = self._bar.add_task("", total=config.steps, completed=trainer.step)
        if self.console.is_terminal:
            self._bar.start()

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """Move the bar, or print a line if the last one is long enough ago."""
        text = f"loss {loss:.3f}{self._speed}"
        self._bar.update(self._task, completed=trainer.step, description=text)
        if not self.console.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_SECONDS
            self._say(f"step {trainer.step}/{trainer.config.steps}  {text}{self._time_left()}")

    def on_log(self, trainer: Trainer, values: Mapping[str, float | str]) -> None:
        """Take up the speed, and print a validation or what was skipped."""
        if "tokens_per_second" in values:
            self._speed = f"  {values['tokens_per_second']:,.0f} tokens/s"
        if "valid_loss_nats" in values:
            self._say(
                f"step {trainer.step}: validation loss {values['valid_loss_nats']:.4f} nats/token, "
                f"perplexity {values['valid_perplexity']:.2f}, "
                f"{values['valid_bits_per_byte']:.3f} bits/byte"
            )
        if "skipped" in values:
            self._say(f"left out {values['skipped']}")

    def on_interrupt(self, trainer: Trainer) -> None:
        """Say that the run will stop soon, and how to stop it at once."""
        self._say("finishing this step and saving; Ctrl-C again stops at once")

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """Say where the checkpoint is."""
        self._say(f"step {trainer.step}: saved {folder}")

    def on_end(self, trainer: Trainer) -> None:
        """Leave the bar as it is."""
        if self.console.is_terminal:
            self._bar.stop()

    def _time_left(self) -> str:
        seconds = self._bar.tasks[self._task].time_remaining
        return "" if seconds is None else f"  {seconds / 60:.1f} min left"

    def _say(self, text: str) -> None:
        # Not marked up: a path in brackets is no style. Not wrapped: logs are searched by line.
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
