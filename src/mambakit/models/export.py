"""Exported models (`torch.export`), in a program that has not made them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.export

import mambakit.models.state  # noqa: F401  # The types of states in the files.
from mambakit.errors import CheckpointError
from mambakit.ops import cpu, cuda


def load_exported(path: str | os.PathLike[str]) -> torch.export.ExportedProgram:
    """Open a model that `torch.export.save` wrote; without the classes that it was made of.

    Such a file names our operators, and PyTorch finds only those whose modules have been imported.
    `torch.export.load` does the same after this function has been called once.

    Args:
        path: File, usually `.pt2`.

    Raises:
        CheckpointError: There is no such file, it is damaged, or not an exported program.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from mambakit import MambaConfig, MambaLanguageModel
        >>> model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=1, vocab_size=8)).eval()
        >>> tokens = torch.tensor([[1, 2, 3, 4]])
        >>> with TemporaryDirectory() as folder, torch.no_grad():
        ...     torch.export.save(torch.export.export(model, (tokens,)), Path(folder, "model.pt2"))
        ...     logits, state = load_exported(Path(folder, "model.pt2")).module()(tokens)
        >>> torch.equal(logits, model(tokens)[0])
        True
    """
    for backend in (cpu, cuda):
        for file in set(backend.FILES.values()):
            getattr(backend, file)
    if not Path(path).is_file():
        raise CheckpointError(f"{path} is missing; give a file of torch.export.save")
    try:
        return torch.export.load(path)
    except Exception as error:  # Many types: zip, pickle, JSON, version of the schema.
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} is damaged, or no exported program that this PyTorch reads ({reason}); "
            "export the model again"
        ) from error
