"""Training: a config, a trainer, and what watches it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mambakit.lazy import attach

if TYPE_CHECKING:
    from mambakit.train.callbacks import Callback as Callback
    from mambakit.train.config import TrainConfig as TrainConfig
    from mambakit.train.progress import Progress as Progress
    from mambakit.train.trainer import Outcome as Outcome
    from mambakit.train.trainer import Trainer as Trainer

_EXPORTS = {
    "Callback": "mambakit.train.callbacks",
    "Outcome": "mambakit.train.trainer",
    "Progress": "mambakit.train.progress",
    "TrainConfig": "mambakit.train.config",
    "Trainer": "mambakit.train.trainer",
}
__all__ = ["Callback", "Outcome", "Progress", "TrainConfig", "Trainer"]

__getattr__, __dir__ = attach(__name__, _EXPORTS)
