"""What is different from one format of checkpoints to another. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from mambakit.errors import ConfigError
from mambakit.models.config import MambaConfig

Description = Mapping[str, Any]
"""A config.json as it was read."""

CONFIG_FILE = "config.json"
SAFETENSORS: Final = "model.safetensors"
PICKLE: Final = "pytorch_model.bin"


class SavedTokenizer(Protocol):
    """What a checkpoint needs of a tokenizer; `mambakit.data.Tokenizer` has it."""

    @property
    def eos_id(self) -> int:
        """Id that ends a text."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A folder of config.json and weights, as one program writes it.

    Attributes:
        name: What users call the format.
        recognises: Whether a config.json is of this format.
        read: The config that a config.json describes; ConfigError if there is no such model here.
        describe: The config.json of a config, and of the id that ends a text (None: not known);
            ConfigError if the format has no such model.
        names: Parts of our tensors' names, and what they are in the format.
        weights: The file of the weights.
        stores_tied_head: Whether lm_head.weight is stored where it is that of the embedding.
    """

    name: str
    recognises: Callable[[Description], bool]
    read: Callable[[Description], MambaConfig]
    describe: Callable[[MambaConfig, int | None], dict[str, Any]]
    names: Mapping[str, str] = field(default_factory=dict)
    weights: Literal["model.safetensors", "pytorch_model.bin"] = SAFETENSORS
    stores_tied_head: bool = False

    def theirs(self, name: str) -> str:
        """Name of one of our tensors in the format."""
        for ours, theirs in self.names.items():
            name = name.replace(ours, theirs)
        return name

    def ours(self, name: str) -> str:
        """Name that one of the format's tensors has with us."""
        for ours, theirs in self.names.items():
            name = name.replace(theirs, ours)
        return name


def require(description: Description, wanted: Mapping[str, Any], reason: str) -> None:
    """Raise unless the entries that are there have these values.

    Raises:
        ConfigError: One has another; the message gives the reason.
    """
    for key, value in wanted.items():
        if description.get(key, value) != value:
            raise ConfigError(f"{key} is {description[key]!r}, wanted {value!r}: {reason}")


def require_fields(config: MambaConfig, wanted: Mapping[str, Any], format: str) -> None:
    """Raise unless the fields of a config have the only values for which the format has words.

    Raises:
        ConfigError: One has not.
    """
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"the format {format!r} has no model with {name} = {getattr(config, name)!r}, only "
                f"with {value!r}; save it in the format 'mambakit'"
            )


REAL_AND_SELECTIVE = {"block": "mamba", "selective": ("dt", "B", "C"), "is_complex": False}
"""What all programs but this one take for granted."""
