"""`mambakit reproduce`: run an experiment of the paper, and show its table beside the paper's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mambakit.cli.parsing import parse
from mambakit.errors import ArgumentError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from mambakit.reproduce.experiment import Experiment

PLAIN_SECONDS = 10.0
"""Least time between two lines where there is no terminal."""


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run an experiment of the paper, or go on with one.

    Ctrl-C saves and stops; the same command goes on from there.
    """

    experiment: Annotated[str, tyro.conf.Positional] = ""
    """Name of the experiment; --list shows them."""
    list: bool = False
    """Name the experiments and their models."""
    quick: bool = False
    """A small version that takes minutes on two CPU cores."""
    models: tuple[str, ...] = ()
    """Models to run, in place of all."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""
    out: Path | None = None
    """Folder of checkpoints and results; default: runs/EXPERIMENT, or runs/EXPERIMENT-quick."""
    max_minutes: float = float("inf")
    """Save and stop after so many minutes; the same command goes on."""
    draw: bool = False
    """Only draw dt over a sequence, from the checkpoints that are there."""


def run(args: Sequence[str]) -> int:
    """Run `mambakit reproduce`."""
    options = parse(Reproduce, args, "reproduce")
    if not options.max_minutes > 0:  # Nor NaN.
        raise ArgumentError(f"--max-minutes: got {options.max_minutes:g}, wanted more than 0")

    from mambakit.reproduce.catalogue import EXPERIMENTS, find_experiment

    if options.list:
        for found in EXPERIMENTS.values():
            _describe(found)
        return 0
    if not options.experiment:
        raise ArgumentError("experiment: got none; mambakit reproduce --list shows what there is")
    experiment = find_experiment(options.experiment)
    if options.quick:
        experiment = experiment.made_quick()
    suffix = "-quick" if options.quick else ""
    out = options.out or Path("runs", f"{experiment.name}{suffix}")

    from mambakit.train.distributed import find_device

    device = find_device(options.device)
    if options.draw:
        return _draw(experiment, out, device, options.models)
    return _run(experiment, out, device, options)


def _run(experiment: Experiment, out: Path, device: torch.device, options: Reproduce) -> int:
    from rich.console import Console

    from mambakit.reproduce.results import RESULTS, TABLE
    from mambakit.reproduce.runner import reproduce
    from mambakit.train.interruption import Interruption

    console = Console(stderr=True)
    end = time.monotonic() + 60 * options.max_minutes

    def notice() -> None:
        console.print("saving and stopping; Ctrl-C again stops at once")

    with Interruption(notice) as interruption, _Progress(console) as progress:
        is_done = reproduce(
            experiment,
            out,
            device,
            options.models,
            stop=lambda: interruption.signal is not None or time.monotonic() >= end,
            tell=progress.tell,
        )
    if (out / TABLE).exists():
        _print_table(experiment, out)
    if not is_done:
        print(f"saved in {out}; the same command goes on")
        return 0 if interruption.signal is None else 128 + interruption.signal
    print(f"done; {out / RESULTS} has it all")
    return 0


def _print_table(experiment: Experiment, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from mambakit.reproduce.results import read_results, table

    rows = table(experiment, read_results(experiment, out))
    if len(rows[0]) > len(
        rows
    ):  # Many lengths: one below the other, so that a terminal holds them.
        rows = [list(column) for column in zip(*rows, strict=True)]
    header, *rows = rows
    shown = Table(title=f"accuracy in percent; {experiment.source}")
    for number, name in enumerate(header):
        shown.add_column(name, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)


def _draw(experiment: Experiment, out: Path, device: torch.device, models: Sequence[str]) -> int:
    from mambakit.reproduce.runner import draw

    drawn = draw(experiment, out, device, models)
    for path in drawn:
        print(path)
    return 0


def _describe(experiment: Experiment) -> None:
    print(f"{experiment.name}: {experiment.title} ({experiment.source})")
    print(f"  models: {', '.join(experiment.contestants)}")
    print(f"  with --quick: {', '.join(experiment.quick)}")


class _Progress:
    """Shows the last line it was told: live in a terminal, now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stack = contextlib.ExitStack()
        self._next_line = 0.0

    def __enter__(self) -> _Progress:
        if self._console.is_terminal:
            self._status = self._stack.enter_context(self._console.status("beginning"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tell(self, line: str) -> None:
        if self._console.is_terminal:
            self._status.update(line)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_SECONDS
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
