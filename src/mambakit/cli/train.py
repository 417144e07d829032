"""`mambakit train`: begin a run, or go on with one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mambakit.cli.parsing import parse
from mambakit.data.manifest import Manifest, is_prepared
from mambakit.models.presets import preset
from mambakit.train.config import TrainConfig, read_toml

if TYPE_CHECKING:
    from mambakit.train.callbacks import Callback


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model, or go on with the run that is in the folder --out.

    With --init-from a checkpoint is trained further; with --lora too, small adapters of it.
    Ctrl-C saves and stops; the same command goes on from there. On several GPUs:
    torchrun --nproc-per-node 8 -m mambakit train ...
    """

    config: Path | None = None
    """TOML file with any of the options below; a flag wins over the file."""
    preset: str | None = None
    """Shape of a released model: 130m, 370m, 790m, 1.4b or 2.8b."""
    overwrite: bool = False
    """Start afresh, removing the run that is in the folder."""
    sample_every: int = 0
    """Steps between two samples of what the model writes; 0: none."""
    sample_prompt: str = ""
    """Text that the samples continue; empty: a new document."""
    training: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]


def run(args: Sequence[str]) -> int:
    """Run `mambakit train`."""
    options = parse(Train, args, "train", default=defaults(args))
    config = options.training

    from mambakit.train import run_folder
    from mambakit.train.progress import Progress
    from mambakit.train.trainer import Trainer

    progress = Progress()
    callbacks: list[Callback] = [progress]
    if options.sample_every:
        from mambakit.cli.samples import Samples

        callbacks.append(Samples(options.sample_every, options.sample_prompt, progress.console))
    trainer = Trainer(config, callbacks=callbacks, overwrite=options.overwrite)
    outcome = trainer.fit()
    if not trainer.world.is_main:
        return 0
    print(f"step {outcome.step} of {config.steps} is saved in {config.out}")
    if outcome.signal is not None:
        print(f"go on with: mambakit train --config {config.out / run_folder.CONFIG}")
        return 128 + outcome.signal
    print(f"next: mambakit generate --checkpoint {config.out}")
    return 0


def defaults(args: Sequence[str]) -> Train:
    """The options before the flags: from what --config, --preset, --data and --init-from name."""
    names = ("--config", "--preset", "--data", "--init-from")
    config, shape, data, start = (_value(args, name) for name in names)
    values = read_toml(Path(config)) if config else {}
    if start:
        values["init_from"] = start
    if "--lora" in args:
        values["lora"] = True
    if shape:
        values["model"] = preset(shape).to_dict()
    elif values.get("init_from") and "model" not in values:
        values["model"] = _shape_of(values["init_from"])
    training = TrainConfig.from_dict({"data": "", "out": "", **values})
    data = data or values.get("data")
    if data and is_prepared(data) and (shape or "vocab_size" not in values.get("model", {})):
        model = dataclasses.replace(training.model, vocab_size=Manifest.load(data).vocab_size)
        training = dataclasses.replace(training, model=model)
    for name in ("data", "out"):
        if name not in values:
            object.__setattr__(training, name, tyro.MISSING)  # So that tyro asks for it.
    return Train(training=training)


def _shape_of(checkpoint: str) -> dict[str, Any]:
    """The model's fields in the checkpoint that a run starts from."""
    from mambakit.models.checkpoint import read_config
    from mambakit.models.hub import locate
    from mambakit.train.start import find_start

    return read_config(locate(find_start(checkpoint))).to_dict()


def _value(args: Sequence[str], flag: str) -> str | None:
    """The value that a flag has on the command line, without parsing the rest."""
    value = None
    for arg, following in pairwise([*args, ""]):
        if arg == flag:
            value = following
        elif arg.startswith(f"{flag}="):
            value = arg.removeprefix(f"{flag}=")
    return value
