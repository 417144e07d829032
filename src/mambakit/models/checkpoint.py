"""The checkpoint format of mambakit: a folder with model.safetensors and config.json.

The config is written last, so a folder that has one is complete. A tokenizer may lie beside them as
tokenizer.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mambakit.errors import CheckpointError, ConfigError
from mambakit.files import atomic_write
from mambakit.models.config import MambaConfig
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.quantisation import Quantisation, quantise
from mambakit.nn.quantised_linear import QuantisedEmbedding

FORMAT = "mambakit"
VERSION = 2
"""Of a quantised checkpoint; one with float weights has version 1, which older programs can read."""
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_HEAD = "lm_head."
_EMBEDDING = "backbone.embedding."


def save_model(model: MambaLanguageModel, folder: str | os.PathLike[str]) -> None:
    """Write weights and config; an existing checkpoint in the folder is replaced, file by file.

    A tied head is not stored. Each file is written beside and renamed, the config last.

    Raises:
        MambakitError: The folder cannot be written, or the disk is full.
    """
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        weights = {n: tensor for n, tensor in weights.items() if not n.startswith(_HEAD)}
    description = {"format": FORMAT, "version": 1, "model": model.config.to_dict()}
    if model.quantisation is not None:
        description |= {"version": 2, "quantisation": model.quantisation.to_dict()}
    with atomic_write(Path(folder) / WEIGHTS_FILE) as path:
        save_file(weights, path, metadata={"format": "pt"})
    with atomic_write(Path(folder) / CONFIG_FILE) as path:
        path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_model(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> MambaLanguageModel:
    """Read a model that `save_model` wrote.

    Args:
        folder: The checkpoint.
        device: Where the weights go.
        dtype: Cast the weights to it (what must stay float32 does). Default: as they were saved.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, does not fit its config, is from a
            newer version, or has weights that are not finite.
    """
    config, quantisation = _read_description(folder)
    path = Path(folder) / WEIGHTS_FILE
    weights = _read_weights(path, device)
    with torch.device("meta"):
        model = MambaLanguageModel(config)
        if quantisation is not None:
            quantise(model, quantisation)
    if config.tie_embeddings:
        weights |= {
            _HEAD + name.rpartition(".")[2]: tensor
            for name, tensor in weights.items()
            if name.startswith(_EMBEDDING)
        }
    _check_weights(path, weights, model.state_dict())
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    embedding: Any = model.backbone.embedding
    if isinstance(embedding, QuantisedEmbedding):
        embedding.dtype = model.backbone.norm_f.weight.dtype
    return model if dtype is None else model.to(dtype)


def read_config(folder: str | os.PathLike[str]) -> MambaConfig:
    """Read the config of a checkpoint.

    Raises:
        CheckpointError: There is none, or it cannot be read or understood.
    """
    return _read_description(folder)[0]


def read_quantisation(folder: str | os.PathLike[str]) -> Quantisation | None:
    """How the weights of a checkpoint are quantised; None if they are floats.

    Raises:
        CheckpointError: As `read_config`.
    """
    return _read_description(folder)[1]


def _read_description(
    folder: str | os.PathLike[str],
) -> tuple[MambaConfig, Quantisation | None]:
    path = Path(folder) / CONFIG_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {CONFIG_FILE}; name a folder that has one"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; restore it from a backup"
        ) from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(
            f'{path} is of another program (it has no "format": "{FORMAT}"); '
            "give a folder that mambakit saved"
        )
    return _understand(path, description)


def _understand(path: Path, description: dict[str, Any]) -> tuple[MambaConfig, Quantisation | None]:
    version = description.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"{path} has version {version!r}, newer than the {VERSION} known here; upgrade mambakit"
        )
    model = description.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f'{path} has no "model" entry; restore it from a backup')
    quantisation = description.get("quantisation")
    if quantisation is not None and not isinstance(quantisation, dict):
        raise CheckpointError(
            f'{path} has "quantisation": {quantisation!r}, wanted fields; restore it from a backup'
        )
    try:
        known = None if quantisation is None else Quantisation.from_dict(quantisation)
        return MambaConfig.from_dict(model), known
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_weights(path: Path, device: torch.device | str) -> dict[str, torch.Tensor]:
    try:
        return load_file(path, device=str(device))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is not complete") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut off ({error}); copy or save it again"
        ) from error


def _check_weights(
    path: Path, weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> None:
    """Raise unless the weights are those of the model, and finite."""
    for name in wanted:
        if name not in weights:
            raise CheckpointError(f"{path} does not fit its {CONFIG_FILE}: it lacks {name}")
    for name, tensor in weights.items():
        if name not in wanted:
            raise CheckpointError(f"{path} does not fit its {CONFIG_FILE}: {name} is unknown")
        got, want = tuple(tensor.shape), tuple(wanted[name].shape)
        if got != want:
            raise CheckpointError(
                f"{path} does not fit its {CONFIG_FILE}: {name} has shape {got}, wanted {want}"
            )
        kind = wanted[name].dtype
        if tensor.dtype != kind and not (kind.is_floating_point and tensor.is_floating_point()):
            raise CheckpointError(
                f"{path} does not fit its {CONFIG_FILE}: {name} is {tensor.dtype}, wanted {kind}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinite numbers; use an earlier checkpoint"
            )
