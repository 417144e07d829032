"""The folder of a run: what belongs to it, and whether a config may go on with it.

    config.toml     the config, complete; `mambakit train --config` reads it
    log.jsonl       a line of metrics every `log_every` steps, and one for each validation
    tensorboard/    the same for `tensorboard --logdir`
    loss.png        training and validation loss over the steps
    checkpoints/    see `mambakit.train.checkpointing`

What else lies in the folder is left alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambakit.errors import ConfigError

CONFIG = "config.toml"
LOG = "log.jsonl"
EVENTS = "tensorboard"
PICTURE = "loss.png"
CHECKPOINTS = "checkpoints"

# A run goes on with any other option changed, but not with these, and not with another model.
_FIXED = ("data_content", "processes", "seqlen", "batch_size", "accumulation", "documents", "seed")
_PLACES = ("data", "out", "device")


def remove_run(run: Path) -> None:
    """Remove what a run has written, and nothing else that lies in its folder."""
    for name in (CONFIG, LOG, PICTURE):
        (run / name).unlink(missing_ok=True)
    for name in (EVENTS, CHECKPOINTS):
        if (run / name).exists():
            shutil.rmtree(run / name)


def compare(old: Mapping[str, Any], new: Mapping[str, Any], run: Path) -> list[str]:
    """Compare the identity of a run with that of the trainer that shall go on with it.

    Args:
        old: Config of the run so far as plain values, with `data_content` and `processes`.
        new: The same of the trainer.
        run: Run folder, for the message.

    Returns:
        The differences, such as "lr 0.001 -> 0.003".

    Raises:
        ConfigError: Something differs that decides the course of the run from its start.
    """
    before, after = _flatten(old), _flatten(new)
    differences = {
        key: "text or tokenizer" if key == "data_content" else f"{key} {before.get(key)} -> {value}"
        for key, value in after.items()
        if key not in _PLACES and before.get(key) != value
    }
    fixed = [text for key, text in differences.items() if key in _FIXED or key.startswith("model.")]
    if fixed:
        raise ConfigError(
            f"the run in {run} cannot go on with another {', '.join(fixed)}; "
            "give the old values, or another folder, or overwrite the run to start afresh"
        )
    return list(differences.values())


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    model = {f"model.{key}": value for key, value in values["model"].items()}
    return {**{key: value for key, value in values.items() if key != "model"}, **model}
