"""Scoring a model on a text, for the commands that do."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mambakit.errors import ArgumentError

if TYPE_CHECKING:
    from mambakit.data import TokenDataset, Tokenizer
    from mambakit.evaluate import Score
    from mambakit.models import MambaLanguageModel


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a text is read. Every window of --seqlen tokens starts from an empty state."""

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
    text_key: str = "text"
    """Key or column of the text in .jsonl and .parquet."""

    def __post_init__(self) -> None:
        for name, value in (("seqlen", self.seqlen), ("batch_size", self.batch_size)):
            if value < 1:
                raise ArgumentError(f"{name}: got {value}, wanted at least 1")


@contextlib.contextmanager
def open_text(
    sources: Sequence[str], options: Windows, tokenizer: Tokenizer
) -> Iterator[TokenDataset]:
    """The tokens of a text: as they were prepared, or prepared for this once."""
    from mambakit.data import TokenDataset, prepare
    from mambakit.data.manifest import is_prepared

    if len(sources) == 1 and is_prepared(sources[0]):
        yield TokenDataset(sources[0], options.split, tokenizer)
        return
    # Windows cannot remove a file that is still mapped into memory; the system does it later.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tokens = Path(folder, "tokens")
        prepare(
            sources,
            tokens,
            tokenizer,
            valid_fraction=0,
            errors=options.errors,
            text_key=options.text_key,
        )
        yield TokenDataset(tokens, "train", tokenizer)


def score_on(
    model: MambaLanguageModel, dataset: TokenDataset, options: Windows, tokenizer: Tokenizer
) -> Score:
    """Score a model, with a bar on the terminal meanwhile."""
    from rich.console import Console
    from rich.progress import track

    from mambakit.data import windows
    from mambakit.evaluate import count_bytes, score

    console = Console(stderr=True)
    batches = track(
        windows(dataset, options.seqlen, options.batch_size, documents=options.documents),
        description="reading",
        total=math.ceil((len(dataset) - 1) / (options.seqlen * options.batch_size)),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    return score(model, batches, count_bytes(tokenizer))
