"""Checkpoints of a run: whole folders, each with all that a run needs to go on as if never stopped.

    RUN/checkpoints/step-00001000/
        model.safetensors, config.json    the model, as `mambakit.models.load_model` opens it; if only
                                          adapters are trained, these (`mambakit.models.adapter`) instead
        tokenizer.json or the like        the tokenizer
        training_state.pt                 optimizer, random numbers, data position, step, config

A folder appears by one rename, when all in it is on disk. So whatever has this name is whole.
"""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambakit.data.tokenizer import Tokenizer
from mambakit.errors import CheckpointError, MambakitError
from mambakit.files import atomic_folder
from mambakit.models.adapter import Adapter, is_adapter
from mambakit.models.checkpoint import save_model
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.weights import write_pickle
from mambakit.train.run_folder import CHECKPOINTS

STATE_FILE = "training_state.pt"
STATE_VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")


def list_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in (run / CHECKPOINTS).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_model(path: Path) -> Path:
    """The model folder that a user means: `path` itself, or the last checkpoint of a run folder.

    Raises:
        CheckpointError: There is neither.
    """
    if (path / "config.json").is_file() or is_adapter(path):
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise CheckpointError(
            f"{path} is neither a checkpoint (a folder with config.json and model.safetensors) "
            "nor a run folder with checkpoints"
        )
    return checkpoints[-1]


def save_checkpoint(
    run: Path,
    step: int,
    model: MambaLanguageModel,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    keep: int,
    adapter: Adapter | None = None,
) -> Path:
    """Save a checkpoint, whole or not at all, then remove all but the last `keep`.

    Args:
        run: Run folder.
        step: Optimizer steps done.
        model: Model to save.
        tokenizer: Saved beside it, so that the folder alone can generate.
        state: What `load_training_state` shall give back; plain values and tensors only.
        keep: Checkpoints to keep, this one included.
        adapter: If given, it is saved in place of the model.

    Raises:
        CheckpointError: It cannot be written, as when the disk is full. Earlier ones are untouched.
    """
    folder = run / CHECKPOINTS / f"step-{step:08d}"
    try:
        with atomic_folder(folder) as partial:
            if adapter is None:
                save_model(model, partial)
            else:
                adapter.save(partial)
            tokenizer.save(partial)
            write_pickle({"version": STATE_VERSION, "step": step, **state}, partial / STATE_FILE)
    except MambakitError as error:
        kept = list_checkpoints(run)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier one"
        raise CheckpointError(f"step {step} could not be saved: {error}; {last}") from error
    for old in list_checkpoints(run)[:-keep]:
        # Renamed first, so that a kill while its files go leaves nothing that looks whole.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))
    return folder


def remove_leftovers(run: Path) -> None:
    """Remove the parts of checkpoints that a killed process was writing or removing."""
    for leftover in (run / CHECKPOINTS).glob(".step-*.partial"):
        shutil.rmtree(leftover)


def load_training_state(checkpoint: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` was given as `state`, with `step`.

    Raises:
        CheckpointError: The file is missing, damaged, or from a newer version.
    """
    path = checkpoint / STATE_FILE
    remedy = f"remove {checkpoint} to go on from an earlier checkpoint"
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {remedy}") from error
    except Exception as error:  # A damaged file fails in many ways inside torch and zipfile.
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); {remedy}") from error
    if state["version"] > STATE_VERSION:
        raise CheckpointError(
            f"{path} has version {state['version']}, this mambakit reads up to {STATE_VERSION}; "
            "upgrade mambakit"
        )
    return state


def random_state() -> dict[str, Any]:
    """The state of every global random number generator, as plain values and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every global random number generator to what `random_state` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, index)
