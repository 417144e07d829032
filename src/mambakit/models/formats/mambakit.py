"""Our own format: {"format": "mambakit", "version": 1, "model": {...}}, tensors named as in the model."""

from __future__ import annotations

from typing import Any

from mambakit.errors import ConfigError
from mambakit.models.config import MambaConfig
from mambakit.models.formats.layout import Description, Layout

NAME = "mambakit"
VERSION = 1


def _recognises(description: Description) -> bool:
    return description.get("format") == NAME


def _read(description: Description) -> MambaConfig:
    version, model = description.get("version"), description.get("model")
    if not isinstance(version, int) or version > VERSION:
        raise ConfigError(
            f"has version {version!r}, newer than the {VERSION} known here; upgrade mambakit"
        )
    if not isinstance(model, dict):
        raise ConfigError('has no "model" entry; restore it from a backup')
    return MambaConfig.from_dict(model)


def _describe(config: MambaConfig, eos_id: int | None) -> dict[str, Any]:
    # The id that ends a text is known from the tokenizer.
    return {"format": NAME, "version": VERSION, "model": config.to_dict()}


LAYOUT = Layout(name=NAME, recognises=_recognises, read=_read, describe=_describe)
