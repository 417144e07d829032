"""Training: a config, a trainer, and what watches it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'mambakit.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
