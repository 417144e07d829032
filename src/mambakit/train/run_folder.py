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
from mambakit.train.config import TrainConfig

CONFIG = "config.toml"
LOG = "log.jsonl"
EVENTS = "tensorboard"
PICTURE = "loss.png"
CHECKPOINTS = "checkpoints"

# A run goes on with any other option changed, but not with these, and not with another model.
_FIXED = (
    "data_content", "base_content", "processes", "seqlen", "batch_size", "accumulation", "documents",
    "seed", "lora", "lora_rank", "lora_alpha", "lora_targets",
)  # fmt: skip
_PLACES = ("data", "out", "device", "init_from")
_CONTENTS = {"data_content": "text or tokenizer", "base_content": "checkpoint to adapt"}
_DEFAULTS = TrainConfig(data=Path(), out=Path()).to_dict()
"""What a run had for the options that there were not yet when it began."""


def check_place(run: Path, data: Path) -> None:
    """Raise ConfigError if the run folder is in the folder of token files, which is replaced whole by `prepare`."""
    if data.resolve() in (run.resolve(), *run.resolve().parents):
        raise ConfigError(
            f"training config: out is {run}, in the folder of prepared tokens; choose another folder for the run"
        )


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
        old: Config of the run so far as plain values, with `processes`, `data_content` and, if it
            trains adapters, `base_content`.
        new: The same of the trainer.
        run: Run folder, for the message.

    Returns:
        The differences, such as "lr 0.001 -> 0.003".

    Raises:
        ConfigError: Something differs that decides the course of the run from its start.
    """
    before = _flatten({**_DEFAULTS, **old, "model": {**_DEFAULTS["model"], **old["model"]}})
    after = _flatten(new)
    differences = {
        key: _CONTENTS.get(key) or f"{key} {before.get(key)} -> {value}"
        for key, value in after.items()
        if key not in _PLACES and before.get(key) != value
    }
    fixed = [text for key, text in differences.items() if key in _FIXED or key.startswith("model.")]
    if fixed:
        raise ConfigError(
            f"the run in {run} cannot go on with another {', '.join(fixed)}; "
            "give the old values, or another folder, or start afresh with overwrite (--overwrite)"
        )
    return list(differences.values())


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    model = {f"model.{key}": value for key, value in values["model"].items()}
    return {**{key: value for key, value in values.items() if key != "model"}, **model}
