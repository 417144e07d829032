"""Our own format: {"format": "mambakit", "version": 1, "model": {...}}, tensors named as in the model.

A quantised model has version 2, and "quantisation": {...}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambakit.errors import ConfigError
from mambakit.models.config import MambaConfig
from mambakit.models.formats.layout import Description, Layout

NAME = "mambakit"
VERSION = 2
"""Of a quantised model; one with float weights has version 1, which older programs can read."""


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
    return {"format": NAME, "version": 1, "model": config.to_dict()}


def describe_quantised(description: Description, quantisation: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a quantised model, from that of its config and the fields of a `Quantisation`."""
    return {**description, "version": VERSION, "quantisation": {**quantisation}}


def read_quantisation(description: Description) -> Mapping[str, Any] | None:
    """The fields of the `Quantisation` that a config.json of this format holds, if it does.

    Raises:
        ConfigError: There is something else in their place.
    """
    quantisation = description.get("quantisation")
    if quantisation is not None and not isinstance(quantisation, dict):
        raise ConfigError(
            f'has "quantisation": {quantisation!r}, wanted fields; restore it from a backup'
        )
    return quantisation


LAYOUT = Layout(name=NAME, recognises=_recognises, read=_read, describe=_describe)
