"""`mambakit evaluate`: a trained model on a text, or on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mambakit.cli.parsing import parse
from mambakit.cli.scoring import Windows, open_text, score_on
from mambakit.errors import ArgumentError

if TYPE_CHECKING:
    from mambakit.data import Tokenizer
    from mambakit.models import MambaLanguageModel


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How --tasks are run."""

    limit: float | None = None
    """So many examples of each task; below 1, this share of them; default: all."""
    num_fewshot: int | None = None
    """Solved examples in front of each one; default: what the task says."""
    max_length: int | None = None
    """Most tokens read for a prediction; longer contexts lose their beginning; default: no limit."""
    include_path: Path | None = None
    """Folder with tasks of your own, as YAML files of lm-evaluation-harness."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Windows):
    """Measure how well a model predicts a text, or solves tasks of lm-evaluation-harness.

    Of a text, every window of --seqlen tokens starts from an empty state.

    Example: mambakit evaluate --checkpoint runs/demo book.txt

    Example: mambakit evaluate --checkpoint state-spaces/mamba-130m --tokenizer
    EleutherAI/gpt-neox-20b --tasks lambada_openai,hellaswag
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
    batch_size: int = 8
    """Windows of a text read at a time; of tasks, on a GPU, rows and prompts."""
    tasks: str = ""
    """Instead of a text: tasks, groups or YAML files, with commas between; wildcards are allowed."""
    task: Annotated[TaskOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=TaskOptions)
    output: Path | None = None
    """File to write the result to, as JSON."""


def run(args: Sequence[str]) -> int:
    """Run `mambakit evaluate`."""
    options = parse(Evaluate, args, "evaluate")
    _check(options)

    from mambakit.cli.loading import load_checkpoint
    from mambakit.ops.cpu.features import check_bfloat16
    from mambakit.train.distributed import find_device

    if options.precision == "bfloat16":
        check_bfloat16(find_device(options.device))
    model, tokenizer = load_checkpoint(
        options.checkpoint, options.device, options.precision, options.tokenizer
    )
    measure = _on_tasks if options.tasks else _on_text
    if options.output is None:
        measure(options, model, tokenizer)
        return 0
    from mambakit.files import atomic_write

    with atomic_write(options.output) as partial:
        partial.touch()  # Where nothing can be written, that is found before the work.
        result = measure(options, model, tokenizer)
        text = json.dumps(result, indent=2, default=_plain, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")
    return 0


def _check(options: Evaluate) -> None:
    if options.output is not None and options.output.is_dir():
        raise ArgumentError(f"--output {options.output}: is a folder; name a file in it")
    if not options.tasks:
        if not options.sources:
            raise ArgumentError("give a prepared folder or text files to evaluate on, or --tasks")
        if options.task != TaskOptions():
            raise ArgumentError(f"{_changed(options.task)}: is for --tasks, not for a text")
        return
    if options.sources:
        raise ArgumentError(f"got --tasks and {options.sources[0]}, wanted either of them")
    if given := _changed(options, but=("batch_size",)):
        raise ArgumentError(f"{given}: is for a text, not for --tasks")
    if importlib.util.find_spec("lm_eval") is None:
        raise ArgumentError("--tasks needs lm-eval; pip install 'mambakit[eval]'")


def _changed(options: Windows | TaskOptions, but: Sequence[str] = ()) -> str:
    """Flags of one group that were given."""
    kind = Windows if isinstance(options, Windows) else TaskOptions
    return ", ".join(
        f"--{one.name.replace('_', '-')}"
        for one in dataclasses.fields(kind)
        if one.name not in but and getattr(options, one.name) != one.default
    )


def _plain(value: Any) -> Any:
    """What JSON has no word for: numbers of NumPy as numbers, the rest (paths, functions) as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _on_text(options: Evaluate, model: MambaLanguageModel, tokenizer: Tokenizer) -> dict[str, Any]:
    with open_text(options.sources, options, tokenizer) as dataset:
        result = score_on(model, dataset, options, tokenizer)
    print(f"tokens          {result.tokens:>12,}")
    print(f"bytes           {result.bytes:>12,}")
    print(f"nats per token  {result.loss:>12.4f}")
    print(f"perplexity      {result.perplexity:>12.3f}")
    print(f"bits per byte   {result.bits_per_byte:>12.4f}")
    return {
        "tokens": result.tokens,
        "bytes": result.bytes,
        "nats_per_token": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
    }


def _on_tasks(options: Evaluate, model: MambaLanguageModel, tokenizer: Tokenizer) -> dict[str, Any]:
    from lm_eval.utils import make_table

    from mambakit.evaluate.harness import HarnessModel
    from mambakit.evaluate.tasks import evaluate_tasks

    given = options.task
    harness = HarnessModel(
        model, tokenizer, batch_size=options.batch_size, max_length=given.max_length
    )
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    with contextlib.redirect_stdout(sys.stderr):  # What lm_eval says meanwhile.
        results = evaluate_tasks(
            harness,
            names,
            include_path=given.include_path,
            limit=given.limit,
            num_fewshot=given.num_fewshot,
        )
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    return {name: value for name, value in results.items() if name != "samples"}
