"""Adapters of low rank (LoRA), by peft: in a model while they are trained, and in folders.

    adapter_config.json          peft's config; `base_model_name_or_path` is the checkpoint they change
    adapter_model.safetensors    their weights, by peft's names; its metadata has the base's fingerprint

`peft.PeftModel.from_pretrained` opens such a folder, and `mambakit.models.load_model` one of peft.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mambakit.errors import ArgumentError, CheckpointError, ConfigError, MambakitError
from mambakit.files import atomic_write
from mambakit.models.fit import joined
from mambakit.models.formats.layout import CONFIG_FILE
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.weights import open_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_FINGERPRINT = "mambakit.base"
_SAMPLE = 64
"""Numbers of each tensor that the fingerprint looks at: training changes them all."""


class Adapter:
    """Changes of low rank to the weights of a model, which themselves stay as they are.

        y = x W^T + alpha / rank * dropout(x) A^T B^T

    A (rank, K) is random at the start and B (O, rank) zero, so nothing has changed yet. The layers
    are wrapped in place. All weights are frozen but A and B.

    Args:
        model: Float, without adapters. Its `name_or_path` is where its weights are.
        config: `peft.LoraConfig`.

    Attributes:
        fingerprint: Of the weights of the model.

    Raises:
        ConfigError: The model has none of the layers.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1.
    """

    def __init__(self, model: MambaLanguageModel, config: Any) -> None:
        if model.quantisation is not None:
            raise ConfigError(
                f"adapter: the model is quantised to {model.quantisation.bits} bits, which cannot be "
                "merged with it; take the float model it came from"
            )
        self.fingerprint = fingerprint(model)
        self._model = model
        self._config = config
        # Peft warns of a model that was moved; whether it is the same is seen from its fingerprint.
        config.base_model_name_or_path = model.name_or_path
        try:
            self._peft = _package().get_peft_model(model, config)
        except ValueError as error:  # None of the modules is there, or peft cannot wrap one.
            reason = str(error).partition(".")[0]
            raise ConfigError(f"adapter: {reason}; name layers that it has") from error

    @classmethod
    def new(
        cls,
        model: MambaLanguageModel,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: Sequence[str],
    ) -> Adapter:
        """Add one that changes nothing yet to the layers of the mixers that `targets` names."""
        return cls(
            model,
            _package().LoraConfig(
                r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=[*targets]
            ),
        )

    @classmethod
    def open(cls, model: MambaLanguageModel, folder: Path) -> Adapter:
        """Add the one in a folder to the model that it was trained in.

        Raises:
            CheckpointError: It is damaged, of another kind or of other weights than those of the model.
        """
        values = _read_config(folder)
        if values.get("peft_type") != "LORA":
            raise CheckpointError(
                f"{folder / CONFIG} is of an adapter of the kind {values.get('peft_type')}, wanted LORA; "
                "merge it with peft, and save the model"
            )
        try:
            adapter = cls(model, _package().PeftConfig.from_peft_type(**values))
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{folder} does not fit its base: {error}") from error
        adapter.load(folder)
        return adapter

    def save(self, folder: Path) -> None:
        """Write both files into a folder; the config last.

        Raises:
            MambakitError: The folder cannot be written, or the disk is full.
        """
        metadata = {"format": "pt", _FINGERPRINT: self.fingerprint}
        with atomic_write(folder / WEIGHTS) as partial:
            save_file(self._state_dict(), partial, metadata)
        kind = type(self._model)
        fields = self._config.to_dict()
        description = {
            **{k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()},
            "inference_mode": True,
            "auto_mapping": {
                "base_model_class": kind.__name__,
                "parent_library": kind.__module__,
            },
        }
        with atomic_write(folder / CONFIG) as partial:
            partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take the values of one that was saved, of the same sizes and of the same base.

        Raises:
            CheckpointError: They are missing, damaged, or of another model.
        """
        path = folder / WEIGHTS
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy or save the adapter again")
        found, wanted = open_tensors(path), self._state_dict()
        with safe_open(path, framework="pt") as file:
            base = (file.metadata() or {}).get(_FINGERPRINT, self.fingerprint)
        if base != self.fingerprint:
            raise CheckpointError(
                f"{folder} was trained on other weights than those in {self._model.name_or_path}; "
                f"put the old ones back, or name their place in {CONFIG}"
            )
        if different := found.keys() ^ wanted.keys() or _misshapen(found, wanted):
            raise CheckpointError(
                f"{path} does not fit {CONFIG} and the model: {joined(sorted(different))} "
                "missing, unknown or of another shape"
            )
        _package().set_peft_model_state_dict(self._peft, found)

    def merge(self) -> None:
        """Add the changes to the weights of the model, and take the adapters out; it can be trained again.

        Raises:
            ArgumentError: They are of an embedding and head that share their weight.
        """
        ends = (self._model.backbone.embedding, self._model.lm_head)
        is_plain = all(isinstance(layer, (nn.Embedding, nn.Linear)) for layer in ends)
        if self._model.config.tie_embeddings and not is_plain:
            raise ArgumentError(
                "adapter: is of the embedding or of the head alone, but the model has one matrix for both; "
                "use it with peft, unmerged"
            )
        self._peft.merge_and_unload()
        self._model.requires_grad_(True)

    def _state_dict(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = _package().get_peft_model_state_dict(
            self._peft, save_embedding_layers=False
        )
        return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (folder / CONFIG).is_file() and not (folder / CONFIG_FILE).is_file()


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has wrapped a layer."""
    return any(name.endswith(".base_layer") for name, _ in model.named_modules())


def base_of(folder: Path) -> str:
    """Folder or hub id of the checkpoint that an adapter changes.

    Raises:
        CheckpointError: It is not known, or the config is damaged.
    """
    base = _read_config(folder).get("base_model_name_or_path")
    if not base or not isinstance(base, str) or Path(base).resolve() == folder.resolve():
        raise CheckpointError(
            f"{folder / CONFIG} does not say which model it changes; "
            "name its folder or hub id as base_model_name_or_path there"
        )
    return base


def fingerprint(model: MambaLanguageModel) -> str:
    """SHA-256 of names, shapes and the first numbers of all tensors, whatever their float dtype was."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        start = tensor.flatten()[:_SAMPLE].to("cpu", torch.float32)
        digest.update(f"{name} {[*tensor.shape]} {start.tolist()}".encode())
    return digest.hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; copy it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is no JSON object; copy it again")
    return values


def _misshapen(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in found.items() if tensor.shape != wanted[name].shape]


def _package() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MambakitError("adapters need the package peft; pip install mambakit[lora]") from error
    return peft
