"""Checkpoints of the Hugging Face hub, and those of them that are in the cache of this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mambakit.errors import ArgumentError, CheckpointError
from mambakit.models.formats.layout import CONFIG_FILE, PICKLE, SAFETENSORS

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = (
    CONFIG_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
)


def _patterns(name: str) -> list[str]:
    """Of a file of weights, its shards and their index."""
    stem, suffix = os.path.splitext(name)
    return [name, f"{stem}-*{suffix}", f"{name}.index.json"]


def locate(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a checkpoint: `source` itself, or what the hub has under this id.

    What is in the hub's cache on this machine is not fetched again, and is used without a network.

    Args:
        source: A folder, or a hub id such as "state-spaces/mamba-130m".
        revision: Branch, tag or commit on the hub. Default: the main branch.

    Raises:
        ArgumentError: A revision is asked for, but not of the hub.
        CheckpointError: It is neither, or the hub cannot be reached and the cache does not have it.
    """
    path = Path(source)
    hub_id = path.as_posix()
    if path.exists() or not _HUB_ID.fullmatch(hub_id):
        if revision is not None:
            raise ArgumentError(f"revision: got {revision!r}, but {path} is no id of the hub")
        return path
    from huggingface_hub import snapshot_download

    def fetch(*files: str) -> Path:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*files]))

    try:
        folder = fetch(*_FILES, *_patterns(SAFETENSORS))
        if not any(
            (folder / name).is_file() for name in (SAFETENSORS, f"{SAFETENSORS}.index.json")
        ):
            folder = fetch(*_patterns(PICKLE))
    except Exception as error:  # Many types: offline, not found, gated, proxy.
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{hub_id} is no folder here, and cannot be had from the hub ({reason}); "
            "check the name and the network"
        ) from error
    return folder
