"""mambakit: selective state space models (Mamba) — kernels, models, training, generation.

Public names are loaded on first use, so that `import mambakit` costs milliseconds and no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.models.config import MambaConfig as MambaConfig
    from mambakit.models.language_model import MambaLanguageModel as MambaLanguageModel
    from mambakit.models.presets import preset as preset

__version__ = "0.1.0"

_EXPORTS = {
    "MambaConfig": "mambakit.models.config",
    "MambaLanguageModel": "mambakit.models.language_model",
    "preset": "mambakit.models.presets",
}
__all__ = ["MambaConfig", "MambaLanguageModel", "preset"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'mambakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
