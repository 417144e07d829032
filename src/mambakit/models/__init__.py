"""Models, their configs and their checkpoint format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mambakit.lazy import attach

if TYPE_CHECKING:
    from mambakit.models.checkpoint import FORMATS as FORMATS
    from mambakit.models.checkpoint import load_model as load_model
    from mambakit.models.checkpoint import read_config as read_config
    from mambakit.models.checkpoint import save_model as save_model
    from mambakit.models.config import MambaConfig as MambaConfig
    from mambakit.models.export import load_exported as load_exported
    from mambakit.models.language_model import MambaLanguageModel as MambaLanguageModel
    from mambakit.models.presets import PRESETS as PRESETS
    from mambakit.models.presets import preset as preset
    from mambakit.models.quantisation import Quantisation as Quantisation
    from mambakit.models.quantisation import quantise as quantise
    from mambakit.models.state import ModelState as ModelState
    from mambakit.models.transformer import TransformerLanguageModel as TransformerLanguageModel
    from mambakit.models.transformer import TransformerState as TransformerState
    from mambakit.models.transformer_config import TRANSFORMER_PRESETS as TRANSFORMER_PRESETS
    from mambakit.models.transformer_config import TransformerConfig as TransformerConfig

_EXPORTS = {
    "MambaConfig": "mambakit.models.config",
    "MambaLanguageModel": "mambakit.models.language_model",
    "ModelState": "mambakit.models.state",
    "PRESETS": "mambakit.models.presets",
    "Quantisation": "mambakit.models.quantisation",
    "TRANSFORMER_PRESETS": "mambakit.models.transformer_config",
    "TransformerConfig": "mambakit.models.transformer_config",
    "TransformerLanguageModel": "mambakit.models.transformer",
    "TransformerState": "mambakit.models.transformer",
    "FORMATS": "mambakit.models.checkpoint",
    "load_exported": "mambakit.models.export",
    "load_model": "mambakit.models.checkpoint",
    "preset": "mambakit.models.presets",
    "quantise": "mambakit.models.quantisation",
    "read_config": "mambakit.models.checkpoint",
    "save_model": "mambakit.models.checkpoint",
}
__all__ = [
    "FORMATS",
    "PRESETS",
    "TRANSFORMER_PRESETS",
    "MambaConfig",
    "MambaLanguageModel",
    "ModelState",
    "Quantisation",
    "TransformerConfig",
    "TransformerLanguageModel",
    "TransformerState",
    "load_exported",
    "load_model",
    "preset",
    "quantise",
    "read_config",
    "save_model",
]

__getattr__, __dir__ = attach(__name__, _EXPORTS)
