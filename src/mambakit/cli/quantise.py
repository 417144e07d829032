"""`mambakit quantise`: a checkpoint with weights of eight or four bits from one with float weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mambakit.cli.parsing import parse
from mambakit.cli.scoring import Windows, open_text, score_on
from mambakit.errors import CheckpointError
from mambakit.files import check_new_folder

if TYPE_CHECKING:
    from mambakit.models import MambaLanguageModel
    from mambakit.models.quantisation import Quantisation


@dataclass(frozen=True, kw_only=True)
class Quantise(Windows):
    """Store the matrices of a model as integers of eight or four bits.

    Commands open the result like any checkpoint; it cannot be trained. With --text, the perplexity
    before and after is measured.

    Example: mambakit quantise runs/demo --out runs/demo-int8 --bits 8 --text book.txt
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Checkpoint, run folder (its last checkpoint is taken), or Hugging Face hub id."""
    out: Path
    """Folder to write the quantised checkpoint to."""
    tokenizer: str | None = None
    """bytes, a tokenizer.json, a folder that holds one, or a hub id; default: the checkpoint's."""
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

    from mambakit.cli.loading import find_checkpoint, load_checkpoint
    from mambakit.models.checkpoint import save_model
    from mambakit.models.quantisation import Quantisation

    folder = find_checkpoint(options.checkpoint)
    _check(folder)
    check_new_folder(options.out)
    quantisation = Quantisation(bits=options.bits, group_size=options.group_size)
    model, tokenizer = load_checkpoint(folder, options.device, tokenizer=options.tokenizer)
    if options.text:
        with open_text(options.text, options, tokenizer) as dataset:
            before = score_on(model, dataset, options, tokenizer)
            _quantise(model, quantisation)
            after = score_on(model, dataset, options, tokenizer)
    else:
        _quantise(model, quantisation)
    save_model(model, options.out, tokenizer=tokenizer)
    before_mb, after_mb = _megabytes(folder), _megabytes(options.out)
    print(f"weights, MB     {before_mb:>12,.1f}  to {after_mb:>12,.1f}")
    if options.text:
        print(f"tokens          {before.tokens:>12,}")
        print(f"nats per token  {before.loss:>12.4f}  to {after.loss:>12.4f}")
        print(f"perplexity      {before.perplexity:>12.3f}  to {after.perplexity:>12.3f}")
        print(f"bits per byte   {before.bits_per_byte:>12.4f}  to {after.bits_per_byte:>12.4f}")
    print(f"wrote {options.out}")
    return 0


def _check(folder: Path) -> None:
    """Raise before any work if it would be in vain."""
    from mambakit.models.checkpoint import read_quantisation

    if (found := read_quantisation(folder)) is not None:
        raise CheckpointError(
            f"{folder} is quantised to {found.bits} bits already; "
            "give the checkpoint with float weights that it came from"
        )


def _megabytes(folder: Path) -> float:
    """Size of the weights of a checkpoint; of an adapter, those of the model it is merged into."""
    from mambakit.models.checkpoint import base_folder
    from mambakit.models.weights import weight_files

    return sum(file.stat().st_size for file in weight_files(base_folder(folder))) / 1e6


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
