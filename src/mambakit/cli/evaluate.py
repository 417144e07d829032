"""`mambakit evaluate`: perplexity and bits per byte of a trained model on a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mambakit.cli.parsing import parse
from mambakit.cli.scoring import Windows, open_text, score_on
from mambakit.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Evaluate(Windows):
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
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""


def run(args: Sequence[str]) -> int:
    """Run `mambakit evaluate`."""
    options = parse(Evaluate, args, "evaluate")
    if not options.sources:
        raise ArgumentError("give a prepared folder or text files to evaluate on")

    from mambakit.cli.loading import load_checkpoint
    from mambakit.ops.cpu.features import check_bfloat16
    from mambakit.train.distributed import find_device

    if options.precision == "bfloat16":
        check_bfloat16(find_device(options.device))
    model, tokenizer = load_checkpoint(
        options.checkpoint, options.device, options.precision, options.tokenizer
    )
    with open_text(options.sources, options, tokenizer) as dataset:
        result = score_on(model, dataset, options, tokenizer)
    print(f"tokens          {result.tokens:>12,}")
    print(f"bytes           {result.bytes:>12,}")
    print(f"nats per token  {result.loss:>12.4f}")
    print(f"perplexity      {result.perplexity:>12.3f}")
    print(f"bits per byte   {result.bits_per_byte:>12.4f}")
    return 0
