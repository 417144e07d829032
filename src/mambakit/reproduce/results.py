"""What an experiment ends with: a result file for each model, one for all, and the table beside the paper's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mambakit.files import atomic_write
from mambakit.reproduce.evaluation import OUT_OF_MEMORY
from mambakit.reproduce.experiment import Contestant, Experiment
from mambakit.reproduce.recipe import Recipe

RESULT = "result.json"
RESULTS = "results.json"
TABLE = "table.md"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a result."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_results(experiment: Experiment, out: Path) -> dict[str, dict[str, Any]]:
    """The results of the models that have one, in the order of the experiment."""
    paths = {name: out / name / RESULT for name in experiment.contestants}
    return {n: json.loads(p.read_text(encoding="utf-8")) for n, p in paths.items() if p.exists()}


def table(experiment: Experiment, results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows: accuracy in percent at each length, and the paper's below where it gives one.

    For a test that is not done stands the last validation at that length, or "…" if there is none; "-" for one that the
    recipe leaves out or the paper does not give.
    """
    lengths = sorted({n for c in experiment.contestants.values() for n in c.recipe.test_lengths})
    rows = [["model", "parameters", "steps", *map(_length, lengths)]]
    for name, contestant in experiment.contestants.items():
        if result := results.get(name):
            early = " (early)" if result["stopped_early"] else ""
            cells = [_cell(result, n, contestant.recipe) for n in lengths]
            steps = f"{result['step']:,}{early}"
            rows.append([contestant.title, f"{result['parameters']:,}", steps, *cells])
        if contestant.paper:
            cells = [_paper_cell(contestant, n) for n in lengths]
            rows.append([f"{contestant.title}: paper", "", "", *cells])
    return rows


def _length(seqlen: int) -> str:
    power = seqlen.bit_length() - 1
    return f"2^{power}" if seqlen == 2**power and power > 9 else str(seqlen)


def _cell(result: Mapping[str, Any], seqlen: int, recipe: Recipe) -> str:
    score = result["test"].get(str(seqlen))
    if seqlen not in recipe.test_lengths:
        return "-"
    if score is None or (score["error"] is None and not score["is_whole"]):
        if recipe.validation_lengths != (seqlen,) or not result["history"]:
            return "…"
        return f"{result['history'][-1]['accuracy_percent']:.1f} (validation)"
    return score["error"] or f"{score['accuracy_percent']:.1f}"


def _paper_cell(contestant: Contestant, seqlen: int) -> str:
    if seqlen not in contestant.paper:
        return "-"
    accuracy = contestant.paper[seqlen]
    return OUT_OF_MEMORY if accuracy is None else f"{accuracy:.1f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, numbers to the right."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))
