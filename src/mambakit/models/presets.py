"""The sizes of the released Mamba language models. Imports no torch."""

from __future__ import annotations

import difflib

from mambakit.errors import ConfigError
from mambakit.models.config import MambaConfig

PRESETS = {
    "130m": MambaConfig(d_model=768, n_layer=24),
    "370m": MambaConfig(d_model=1024, n_layer=48),
    "790m": MambaConfig(d_model=1536, n_layer=48),
    "1.4b": MambaConfig(d_model=2048, n_layer=48),
    "2.8b": MambaConfig(d_model=2560, n_layer=64),
}
"""The models released with the paper, by size; their vocabulary is that of GPT-NeoX."""


def preset(name: str) -> MambaConfig:
    """The config of a released model by its size, such as "130m" or "mamba-130m".

    Raises:
        ConfigError: No preset has this name.
    """
    size = name.lower().removeprefix("mamba-")
    if size not in PRESETS:
        near = difflib.get_close_matches(size, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"presets: {', '.join(PRESETS)}"
        raise ConfigError(f"no preset is named {name!r}; {hint}")
    return PRESETS[size]
