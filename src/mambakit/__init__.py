"""mambakit: selective state space models (Mamba) — kernels, models, training, generation.

Public names are loaded on first use, so that `import mambakit` costs milliseconds and no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mambakit.lazy import attach

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

__getattr__, __dir__ = attach(__name__, _EXPORTS)
