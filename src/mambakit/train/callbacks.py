"""Hooks into a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mambakit.train.trainer import Trainer


class Callback:
    """Base of a callback: override what you need. Only the main process calls them."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, when the run is new or has been restored."""

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """After every step; `loss` is in nats per token, not finite if the step was left out."""

    def on_log(self, trainer: Trainer, values: Mapping[str, float | str]) -> None:
        """After every line of the log, with its values."""

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """After every checkpoint."""

    def on_interrupt(self, trainer: Trainer) -> None:
        """When Ctrl-C or SIGTERM asked the run to stop after the current step."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, and when an error ends the run."""
