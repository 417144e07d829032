"""A trained model and its tokenizer, for the commands that use one."""

from __future__ import annotations

from pathlib import Path

import torch

from mambakit.data import Tokenizer, load_tokenizer
from mambakit.errors import CheckpointError
from mambakit.models.checkpoint import load_model
from mambakit.models.hub import locate
from mambakit.models.language_model import MambaLanguageModel
from mambakit.train.checkpointing import find_model
from mambakit.train.distributed import find_device


def load_checkpoint(
    source: Path, device: str, precision: str = "float32", tokenizer: str | None = None
) -> tuple[MambaLanguageModel, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        source: Checkpoint, run folder (its last one is taken), or hub id.
        device: What `find_device` takes.
        precision: Type of the weights.
        tokenizer: What `load_tokenizer` takes. Default: the one in the checkpoint.

    Raises:
        CheckpointError: There is no checkpoint, it cannot be used, or it has no tokenizer.
    """
    place = find_device(device)
    folder = find_checkpoint(source)
    found = find_tokenizer(folder, tokenizer)
    if found is None:
        raise CheckpointError(
            f"{folder} has no tokenizer.json; name the model's with --tokenizer "
            "(that of the released Mamba models is EleutherAI/gpt-neox-20b)"
        )
    model = load_model(folder, place, getattr(torch, precision)).eval()
    leave_out_padding(model, found)
    return model, found


def leave_out_padding(model: MambaLanguageModel, tokenizer: Tokenizer) -> None:
    """Let a model write no ids that its tokenizer does not have; some formats do not say which."""
    if tokenizer.vocab_size < model.config.vocab_size:
        model.config = model.config.with_vocabulary(tokenizer.vocab_size)


def find_checkpoint(source: Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint, of the last one of a run, or of a hub id."""
    return find_model(locate(source, revision))


def find_tokenizer(folder: Path, named: str | None) -> Tokenizer | None:
    """The tokenizer that is named, else the one of a checkpoint, if it has one."""
    if named is not None:
        return load_tokenizer(named)
    return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
