"""`mamba_ssm.utils.hf`: config and weights from a folder or the Hugging Face hub."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mambakit.models.checkpoint import LAYOUTS, read_description
from mambakit.models.formats import official
from mambakit.models.formats.layout import CONFIG_FILE, Layout
from mambakit.models.hub import locate
from mambakit.models.weights import read_tensors, weight_files


def load_config_hf(model_name: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a config.json as the authors' code writes them, whichever program wrote it.

    Args:
        model_name: Folder or hub id.

    Raises:
        CheckpointError: There is none.
        ConfigError: It describes a model that the authors' code does not have.
    """
    folder = locate(model_name)
    description = read_description(folder / CONFIG_FILE)
    layout = _layout(description)
    if layout is official.LAYOUT:
        return description
    return official.LAYOUT.describe(layout.read(description), None)


def load_state_dict_hf(
    model_name: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The weights by the authors' names. Code in a pickle is refused.

    Args:
        model_name: Folder or hub id.
        device: Where they go. Default: the CPU.
        dtype: Cast them to it. Default: as they were saved.
    """
    folder = locate(model_name)
    layout = _layout(read_description(folder / CONFIG_FILE))
    weights = dict[str, Tensor]()
    for file in weight_files(folder):
        weights |= read_tensors(
            file, torch.device(device or "cpu"), lambda _, tensor: dtype or tensor.dtype
        )
    return {layout.ours(name): tensor for name, tensor in weights.items()}


def _layout(description: dict[str, Any]) -> Layout:
    """The format of a checkpoint; what is not known is taken for the authors'."""
    return next((it for it in LAYOUTS.values() if it.recognises(description)), official.LAYOUT)
