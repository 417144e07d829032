"""`mambakit generate`: continue texts with a trained model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mambakit.cli.parsing import parse
from mambakit.errors import DataError
from mambakit.generate.options import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a text with a trained model, as it comes.

    Example: mambakit generate --checkpoint runs/demo --prompt "def " --max-tokens 400
    """

    checkpoint: Path
    """Checkpoint, run folder (its last checkpoint is taken), or Hugging Face hub id."""
    tokenizer: str | None = None
    """bytes, a tokenizer.json, a folder that holds one, or a hub id; default: the checkpoint's."""
    prompt: tuple[str, ...] = ()
    """Texts to continue; without any, what comes from stdin; if nothing, a new document."""
    prompt_file: Path | None = None
    """File with the text to continue."""
    max_tokens: int = 256
    """Most tokens to add."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation."""
    seed: int | None = None
    """Seed of the random numbers; default: another one every time."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    sampling: Annotated[SamplingOptions, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: SamplingOptions(temperature=0.8, top_p=0.95)
    )


def run(args: Sequence[str]) -> int:
    """Run `mambakit generate`."""
    options = parse(Generate, args, "generate")
    prompts = _prompts(options)

    from mambakit.cli.loading import load_checkpoint
    from mambakit.generate import stream_text

    model, tokenizer = load_checkpoint(
        options.checkpoint, options.device, options.precision, options.tokenizer
    )
    pieces = stream_text(
        model,
        tokenizer,
        prompts,
        options.sampling,
        max_tokens=options.max_tokens,
        stop=options.stop,
        seed=options.seed,
    )
    if len(prompts) == 1:
        _print_as_it_comes(prompts[0], pieces)
        return 0
    texts = list(prompts)
    with _then(lambda: print("\n\n---\n\n".join(texts))):
        for row, piece in pieces:
            texts[row] += piece
    return 0


def _print_as_it_comes(prompt: str, pieces: Iterator[tuple[int, str]]) -> None:
    """Print a prompt and its continuation; the prompt when the first piece is there."""
    waiting = prompt
    with _then(lambda: print(waiting)):
        for _, piece in pieces:
            print(waiting + piece, end="", flush=True)
            waiting = ""


@contextlib.contextmanager
def _then(finish: Callable[[], None]) -> Iterator[None]:
    """Finish after the body, and after a Ctrl-C in it: with what there is by then."""
    try:
        yield
    except KeyboardInterrupt:
        finish()
        raise
    finish()


def _prompts(options: Generate) -> tuple[str, ...]:
    """The texts to continue, at least one."""
    try:
        if options.prompt_file is not None:
            return (*options.prompt, options.prompt_file.read_text(encoding="utf-8"))
        if options.prompt:
            return options.prompt
        is_piped = sys.stdin is not None and not sys.stdin.isatty()
        return (sys.stdin.read().removesuffix("\n") if is_piped else "",)
    except UnicodeDecodeError as error:
        source = options.prompt_file or "stdin"
        raise DataError(f"{source}: is not {error.encoding} text ({error.reason})") from error
