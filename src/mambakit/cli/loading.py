"""A trained model and its tokenizer, for the commands that use one."""

from __future__ import annotations

from pathlib import Path

import torch

from mambakit.data import Tokenizer, load_tokenizer
from mambakit.errors import CheckpointError
from mambakit.models.checkpoint import load_model
from mambakit.models.language_model import MambaLanguageModel
from mambakit.train.checkpointing import find_model
from mambakit.train.distributed import find_device


def load_checkpoint(
    path: Path, device: str, precision: str = "float32"
) -> tuple[MambaLanguageModel, Tokenizer]:
    """Load the model and the tokenizer of a checkpoint, or of the last one of a run folder.

    Raises:
        CheckpointError: There is no checkpoint, it cannot be used, or it has no tokenizer.
    """
    place = find_device(device)
    folder = find_model(path)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json; put the model's tokenizer there")
    model = load_model(folder, place, getattr(torch, precision))
    return model.eval(), load_tokenizer(folder)
