"""`mambakit quantise`: a checkpoint with weights of eight or four bits from one with float weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mambakit.cli.parsing import parse
from mambakit.cli.scoring import Windows, open_text, score_on
from mambakit.errors import ArgumentError, CheckpointError
from mambakit.files import atomic_write

if TYPE_CHECKING:
    from mambakit.models import MambaLanguageModel
    from mambakit.models.quantisation import Quantisation


@dataclass(frozen=True, kw_only=True)
class Quantise(Windows):
    """Store the matrices of a model as integers of eight or four bits.

    Commands open the result like any checkpoint; it cannot be trained. With --text, the perplexity
    before and after is measured.

    Example: mambakit quantise runs/demo runs/demo-int8 --bits 8 --text book.txt
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Checkpoint, or run folder (its last checkpoint is taken)."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write the quantised checkpoint to."""
    bits: Literal[8, 4] = 8
    """Bits of a weight. With 4, x_proj and dt_proj, one weight in thirty, have 8."""
    group_size: Literal[32, 64, 128] = 64
    """Neighbouring weights that share a scale of 16 bits: smaller is more exact, and larger on disk."""
    text: tuple[str, ...] = ()
    """A prepared folder, or text, to measure the perplexity on; default: it is not measured."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""


def run(args: Sequence[str]) -> int:
    """Run `mambakit quantise`."""
    options = parse(Quantise, args, "quantise")

    from mambakit.cli.loading import load_checkpoint
    from mambakit.models.checkpoint import WEIGHTS_FILE, save_model
    from mambakit.models.quantisation import Quantisation
    from mambakit.train.checkpointing import find_model

    folder = find_model(options.checkpoint)
    _check(folder, options.out)
    quantisation = Quantisation(bits=options.bits, group_size=options.group_size)
    model, tokenizer = load_checkpoint(folder, options.device)
    if options.text:
        with open_text(options.text, options, tokenizer) as dataset:
            before = score_on(model, dataset, options, tokenizer)
            _quantise(model, quantisation)
            after = score_on(model, dataset, options, tokenizer)
    else:
        _quantise(model, quantisation)
    save_model(model, options.out)
    with atomic_write(options.out / "tokenizer.json") as path:
        shutil.copyfile(folder / "tokenizer.json", path)
    sizes = [(place / WEIGHTS_FILE).stat().st_size / 1e6 for place in (folder, options.out)]
    print(f"weights, MB     {sizes[0]:>12,.1f}  to {sizes[1]:>12,.1f}")
    if options.text:
        print(f"tokens          {before.tokens:>12,}")
        print(f"nats per token  {before.loss:>12.4f}  to {after.loss:>12.4f}")
        print(f"perplexity      {before.perplexity:>12.3f}  to {after.perplexity:>12.3f}")
        print(f"bits per byte   {before.bits_per_byte:>12.4f}  to {after.bits_per_byte:>12.4f}")
    print(f"wrote {options.out}")
    return 0


def _check(folder: Path, out: Path) -> None:
    """Raise before any work if it would be in vain, or destroy what it reads."""
    from mambakit.models.checkpoint import read_quantisation

    if (found := read_quantisation(folder)) is not None:
        raise CheckpointError(
            f"{folder} is quantised to {found.bits} bits already; "
            "give the checkpoint with float weights that it came from"
        )
    if out.resolve() == folder.resolve():
        raise ArgumentError(f"out: {out} is the checkpoint that is read; choose another folder")


def _quantise(model: MambaLanguageModel, quantisation: Quantisation) -> None:
    """Quantise, with a bar on the terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from mambakit.models.quantisation import quantise

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("quantising", total=None)
        quantise(
            model, quantisation, lambda done, total: bar.update(task, completed=done, total=total)
        )
