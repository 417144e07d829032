"""`mambakit prepare`: text to token files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mambakit.cli.parsing import parse

if TYPE_CHECKING:
    from mambakit.data import Manifest, Progress


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turn text into token files for training.

    Example: mambakit prepare book.txt notes/ "more/*.jsonl.gz" --out data
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Text files, folders, globs, .jsonl (.gz, .zst), .parquet, or Hugging Face datasets."""
    out: Path
    """Folder to write the token files to."""
    tokenizer: str = "bytes"
    """bytes, a tokenizer.json, a folder that holds one, or a Hugging Face hub id."""
    valid_fraction: float = 0.05
    """Part of the text that is kept for validation."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with text that is not UTF-8: stop, or put U+FFFD in its place."""
    text_key: str = "text"
    """Key or column of the text in .jsonl, .parquet and datasets."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    workers: int | None = None
    """Threads that tokenise; default: one per core."""


def run(args: Sequence[str]) -> int:
    """Run `mambakit prepare`."""
    options = parse(Prepare, args, "prepare")

    from mambakit.data import prepare

    with show_progress() as progress:
        manifest = prepare(
            options.sources,
            options.out,
            options.tokenizer,
            valid_fraction=options.valid_fraction,
            errors=options.errors,
            text_key=options.text_key,
            split=options.split,
            workers=options.workers,
            progress=progress,
        )
    print(f"{describe(manifest)} in {options.out}")
    shape = "--d-model 256 --n-layer 4"  # Small enough for any machine.
    print(f"next: mambakit train --data {options.out} --out runs/first {shape}")
    return 0


def describe(manifest: Manifest) -> str:
    """What a prepared folder holds, in a line."""
    # A document that is cut in two for the validation split counts in both, so there is no sum.
    splits = (
        f"{c.tokens:,} {name} tokens (documents: {c.documents:,})"
        for name, c in manifest.splits.items()
    )
    return f"{', '.join(splits)}, vocabulary {manifest.vocab_size:,},"


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[Progress], None]]:
    """Show a bar on stderr while a corpus is prepared; gives the callback for `prepare`."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(compact=True))
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        start = time.perf_counter()

        def show(progress: Progress) -> None:
            rate = progress.tokens / (time.perf_counter() - start)
            text = f"{progress.tokens:,} tokens  {rate:,.0f} tokens/s"
            bar.update(task, description=text, completed=progress.position, total=progress.size)

        yield show
