"""`mambakit evaluate`: perplexity and bits per byte of a trained model on a text."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mambakit.cli.parsing import parse
from mambakit.errors import ArgumentError

if TYPE_CHECKING:
    from mambakit.data import TokenDataset, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure how well a model predicts a text.

    Every window of --seqlen tokens starts from an empty state.

    Example: mambakit evaluate --checkpoint runs/demo book.txt
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A folder made by `mambakit prepare`, or text as `mambakit prepare` takes it."""
    checkpoint: Path
    """Checkpoint, run folder (its last checkpoint is taken), or Hugging Face hub id."""
    tokenizer: str | None = None
    """bytes, a tokenizer.json, a folder that holds one, or a hub id; default: the checkpoint's."""
    split: str = "valid"
    """Split of a prepared folder."""
    seqlen: int = 1024
    """Tokens per window."""
    batch_size: int = 8
    """Windows read at a time."""
    documents: bool = False
    """Start the state afresh at every document boundary inside a window."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with text that is not UTF-8: stop, or put U+FFFD in its place."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""


def run(args: Sequence[str]) -> int:
    """Run `mambakit evaluate`."""
    options = parse(Evaluate, args, "evaluate")
    if not options.sources:
        raise ArgumentError("give a prepared folder or text files to evaluate on")

    from rich.console import Console
    from rich.progress import track

    from mambakit.cli.loading import load_checkpoint
    from mambakit.data import windows
    from mambakit.evaluate import count_bytes, score

    console = Console(stderr=True)
    model, tokenizer = load_checkpoint(
        options.checkpoint, options.device, options.precision, options.tokenizer
    )
    # Windows cannot remove a file that is still mapped into memory; the system does it later.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        dataset = _open(options, tokenizer, Path(scratch, "tokens"))
        batches = track(
            windows(dataset, options.seqlen, options.batch_size, documents=options.documents),
            description="reading",
            total=math.ceil((len(dataset) - 1) / (options.seqlen * options.batch_size)),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        result = score(model, batches, count_bytes(tokenizer))
    print(f"tokens          {result.tokens:>12,}")
    print(f"bytes           {result.bytes:>12,}")
    print(f"nats per token  {result.loss:>12.4f}")
    print(f"perplexity      {result.perplexity:>12.3f}")
    print(f"bits per byte   {result.bits_per_byte:>12.4f}")
    return 0


def _open(options: Evaluate, tokenizer: Tokenizer, scratch: Path) -> TokenDataset:
    """The tokens of the text: as they were prepared, or prepared for this once."""
    from mambakit.data import TokenDataset, prepare
    from mambakit.data.manifest import is_prepared

    first = options.sources[0]
    if len(options.sources) == 1 and is_prepared(first):
        return TokenDataset(first, options.split, tokenizer)
    prepare(options.sources, scratch, tokenizer, valid_fraction=0, errors=options.errors)
    return TokenDataset(scratch, "train", tokenizer)
