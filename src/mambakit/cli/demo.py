"""`mambakit demo`: train a small model on Python's own source code and read what it writes."""

from __future__ import annotations

import dataclasses
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mambakit.cli.parsing import parse
from mambakit.errors import ArgumentError, DataError
from mambakit.generate.options import SamplingOptions
from mambakit.models.config import MambaConfig
from mambakit.train import run_folder
from mambakit.train.config import TrainConfig, read_toml

# All there is to tune: here, and in `draft_config`.
PROMPT = "class Reader:\n\tdef "
SAMPLE_TOKENS = 600
SAMPLING = SamplingOptions(temperature=0.8, top_p=0.95)
INDENT = "    "
TOKENS = "tokens"
"""Folder of the token files, in the run folder."""


def draft_config(data: Path, out: Path) -> TrainConfig:
    """The run of the demo, but for what `_plan` finds out about the machine."""
    return TrainConfig(
        data=data,
        out=out,
        model=MambaConfig(d_model=192, n_layer=4, vocab_size=257),
        seqlen=256,
        batch_size=8,
        lr=4e-3,
        min_lr=1e-4,
        warmup=0.05,
        valid_tokens=65_536,
        keep=1,
    )


LEFT_OUT = {
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
"""Folders beside the standard library's own code: other people's code, tests, tables."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small model on the source code of Python's standard library and read what it writes.

    Nothing is downloaded. Ctrl-C saves and stops; the same command goes on from there.
    """

    minutes: float = 3.5
    """Time to train; the number of steps is planned from the speed of this machine."""
    out: Path = Path("runs/demo")
    """Run folder."""
    overwrite: bool = False
    """Start afresh, removing the run that is in the folder."""


def run(args: Sequence[str]) -> int:
    """Run `mambakit demo`."""
    options = parse(Demo, args, "demo")
    if not 0 < options.minutes <= 10_000:
        raise ArgumentError(f"minutes: got {options.minutes}, wanted above 0")

    from mambakit.train.checkpointing import list_checkpoints
    from mambakit.train.progress import Progress
    from mambakit.train.trainer import Trainer

    progress = Progress()
    if list_checkpoints(options.out) and not options.overwrite:
        config = _earlier(options.out)
    else:
        with progress.console.status("reading Python's standard library"):
            data = _prepare(options.out)
        with progress.console.status("compiling, and measuring the speed of this machine"):
            config = _plan(data, options.out, options.minutes * 60)
    outcome = Trainer(config, callbacks=[progress], overwrite=options.overwrite).fit()
    if outcome.signal is not None:
        print(f"stopped at step {outcome.step}; go on with: mambakit demo --out {options.out}")
        return 128 + outcome.signal
    _write_sample(options.out)
    _say_what_is_there(options.out)
    return 0


def _earlier(out: Path) -> TrainConfig:
    """The config of the demo's run that is in a folder.

    Raises:
        ArgumentError: The run is not one of the demo.
    """
    config = TrainConfig.from_dict(read_toml(out / run_folder.CONFIG))
    if config.data.resolve() != (out / TOKENS).resolve():
        raise ArgumentError(f"out: {out} holds a run on {config.data}; name a new folder")
    return config


def standard_library() -> list[Path]:
    """The source files of Python's standard library.

    Raises:
        DataError: This Python has none, as some that are packed into one file.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in sorted(root.rglob("*.py"))
        if file.stat().st_size and not LEFT_OUT.intersection(file.relative_to(root).parts)
    ]
    if not files:
        raise DataError(f"{root}: this Python has no source files; try mambakit prepare on a text")
    return files


def _prepare(out: Path) -> Path:
    """Token files of the standard library, made once."""
    from mambakit.data import prepare
    from mambakit.data.manifest import is_prepared

    folder = out / TOKENS
    if not is_prepared(folder):
        with tempfile.TemporaryDirectory() as place:
            prepare(_with_tabs(standard_library(), Path(place)), folder)
    return folder


def _with_tabs(files: Sequence[Path], folder: Path) -> list[Path]:
    """Copies of the files with a tab for every four spaces.

    After a deep line the best guess of the next byte is another space, again and again: a small model
    falls into that and does not come out. It counts tabs.
    """
    copies = []
    for number, file in enumerate(files):
        text = file.read_text(encoding="utf-8", errors="replace")  # A few old files are Latin-1.
        copies.append(folder / f"{number:05}.py")
        copies[-1].write_text(text.replace(INDENT, "\t"), encoding="utf-8")
    return copies


def _plan(data: Path, out: Path, seconds: float) -> TrainConfig:
    """The run that fits into the time on this machine."""
    from mambakit.train.planning import seconds_per_step

    draft = draft_config(data, out)
    # Some of the time goes into validations and checkpoints.
    steps = max(5, int(0.9 * seconds / seconds_per_step(draft)))
    return dataclasses.replace(
        draft,
        steps=steps,
        log_every=max(1, steps // 100),
        valid_every=max(1, steps // 5),
        save_every=max(1, steps // 4),
    )


def _write_sample(run: Path) -> None:
    """Stream what the model makes of the prompt to the terminal."""
    from rich.console import Console

    from mambakit.cli.loading import load_checkpoint
    from mambakit.generate import stream_text

    model, tokenizer = load_checkpoint(run, "auto")
    console = Console()
    console.rule("what the model writes")
    print(PROMPT.replace("\t", INDENT), end="", flush=True)
    for _, piece in stream_text(
        model, tokenizer, [PROMPT], SAMPLING, max_tokens=SAMPLE_TOKENS, seed=0
    ):
        print(piece.replace("\t", INDENT), end="", flush=True)
    print()
    console.rule()


def _say_what_is_there(run: Path) -> None:
    from mambakit.train.checkpointing import find_model

    for what, place in (
        ("checkpoint", find_model(run)),
        ("config", run / run_folder.CONFIG),
        ("log", run / run_folder.LOG),
        ("loss curve", run / run_folder.PICTURE),
        ("TensorBoard", run / run_folder.EVENTS),
    ):
        print(f"{what:<12} {place}")
    print("next:")
    print(f'  mambakit generate --checkpoint {run} --prompt "def "')
    print(f"  mambakit evaluate --checkpoint {run} {run / TOKENS}")
    print("  mambakit prepare YOUR-TEXT --out data")
    print("  mambakit train --data data --out runs/mine --d-model 256 --n-layer 6")
