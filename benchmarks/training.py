"""Speed and memory of training: on one GPU, whole steps of Mamba and of a Transformer of the same size.

    python benchmarks/training.py                            # the table; see CASES
    python benchmarks/training.py --cases mamba-130m         # those whose name starts so; several may be given
    python benchmarks/training.py --sweep batch length       # tokens/s and memory over batch and length
    python benchmarks/training.py --json results.json        # rows of the same commit and GPU are kept
    python benchmarks/training.py --draw results.json --plot picture.png      # no GPU needed
    python benchmarks/training.py --device cpu --json benchmarks/results/training-cpu.json   # see cpu_training.py

A step is forward, backward and fused AdamW, in bfloat16 autocast with float32 weights and a vocabulary of 50,280, on
one batch again and again: that the loss falls is checked, since a speed counts only if the model learns. A step is one
CUDA graph, as in `mambakit train` (--no-graph: eager code). Medians of steps, timed by events. Memory is the most that
tensors took. *x and dt kept*: the mixers keep these for the backward pass (`recomputation = false`) instead of making
them again. MFU counts forward and backward once, as `flops_per_token` does, against the GPU's rated speed in
bfloat16. A case that does not fit is reported as such.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpu_training import measure_on_cpu
from gpu import gpu_environment, merge
from mambakit.models import (
    PRESETS,
    TRANSFORMER_PRESETS,
    MambaLanguageModel,
    TransformerLanguageModel,
)
from mambakit.train.step_graph import EAGER_STEPS, StepGraph
from report import Measurement, print_table

Model = MambaLanguageModel | TransformerLanguageModel
MODELS: dict[str, Callable[[], Model]] = {
    "mamba-130m": lambda: MambaLanguageModel(PRESETS["130m"]),
    "mamba-1.4b": lambda: MambaLanguageModel(PRESETS["1.4b"]),
    "transformer-125m": lambda: TransformerLanguageModel(TRANSFORMER_PRESETS["125m"]),
    "transformer-1.3b": lambda: TransformerLanguageModel(TRANSFORMER_PRESETS["1.3b"]),
}
RATED = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bfloat16 operations a second, from the vendor's data sheets."""


@dataclass(frozen=True)
class Case:
    """One model at one batch and length."""

    model: str
    batch: int
    seqlen: int
    recomputes: bool = True
    """Whether Mamba makes x and dt again in the backward pass, or keeps them because there is room."""

    @property
    def name(self) -> str:
        kept = "" if self.recomputes else ", x and dt kept"
        return f"{self.model} {self.batch}x{self.seqlen}{kept}"


CASES = [
    Case("mamba-130m", 32, 2048),
    Case("transformer-125m", 32, 2048),
    Case("mamba-130m", 8, 2048),
    Case("transformer-125m", 8, 2048),
    Case("mamba-130m", 1, 65536),
    Case("transformer-125m", 1, 65536),
    Case("mamba-1.4b", 4, 2048),
    Case("mamba-1.4b", 4, 2048, recomputes=False),
    Case("transformer-1.3b", 4, 2048),
]
SMALL = ("mamba-130m", "transformer-125m")
SWEEPS = {
    "batch": [Case(model, 2**i, 2048) for model in SMALL for i in range(7)],
    "length": [Case(model, 2 ** (5 - i), 2 ** (11 + i)) for model in SMALL for i in range(6)],
}
"""Over the batch at length 2,048; over the length at 65,536 tokens a step."""


def train(case: Case, repeats: int, is_compiled: bool, graph: bool) -> dict[str, Any]:
    """Measure whole steps; raises `torch.cuda.OutOfMemoryError`."""
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = MODELS[case.model]()
        if isinstance(model, MambaLanguageModel):
            model.recomputation = case.recomputes
        data = torch.randint(model.config.vocab_size, (case.batch, case.seqlen + 1))
    tokens, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=graph)

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        return model.loss(tokens, targets)[0]

    loss_of = torch.compile(loss_of) if is_compiled else loss_of

    def update() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step = StepGraph(update) if graph else update
    first = step().item()  # Compiles.
    for _ in range(EAGER_STEPS + 1):
        step()
    # All steps are queued before the first is over, as in training, where nothing waits for a step.
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        last = step()
        mark.record()
    torch.cuda.synchronize()
    if not last.item() < first:
        raise SystemExit(f"{case.name}: the loss went from {first} to {last.item()}; no speed")
    seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    rate = Measurement.of(seconds).rate(case.batch * case.seqlen)
    flops = rate.median * model.flops_per_token(case.seqlen)
    gpu = torch.cuda.get_device_name()
    rated = next((speed for name, speed in RATED.items() if name in gpu), None)
    return {
        "parameters": model.num_parameters(),
        "tokens_per_s": rate.median,
        "spread": rate.spread,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "tflop_per_s": flops / 1e12,
        "mfu": None if rated is None else flops / rated,
        "first_loss": first,
        "last_loss": last.item(),
    }


def measure(case: Case, repeats: int, compiled: list[str], graph: bool) -> dict[str, Any]:
    """One row: the numbers of `train`, or that it does not fit."""
    is_compiled = any(case.model.startswith(name) for name in compiled)
    row = {"case": case.name, **vars(case), "compiled": is_compiled, "cuda_graph": graph}
    try:
        row |= train(case, repeats, is_compiled, graph)
    except torch.cuda.OutOfMemoryError:
        row["failed"] = "out of memory"
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    return row


def cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [row["case"], row["failed"], "", "", ""]
    mfu = "?" if row["mfu"] is None else f"{row['mfu']:.1%}"
    speed, memory = f"{row['tokens_per_s']:,.0f}", f"{row['peak_gib']:.1f}"
    return [row["case"], speed, f"±{row['spread']:.1%}", memory, mfu]


def plot(rows: list[dict[str, Any]], gpu: str, path: Path) -> None:
    """Tokens/s and memory, over the batch at length 2,048 and over the length at 65,536 tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex="col", layout="constrained")
    measured = {row["case"]: row for row in rows if "failed" not in row}
    for column, (axis_name, cases) in enumerate(SWEEPS.items()):
        key = {"batch": "batch", "length": "seqlen"}[axis_name]
        for model, marker in zip(SMALL, "os", strict=True):
            found = [measured[c.name] for c in cases if c.model == model and c.name in measured]
            for axis, what, unit in zip(
                axes[:, column], ("tokens_per_s", "peak_gib"), (1e3, 1), strict=True
            ):
                points = [row[what] / unit for row in found]
                axis.plot([row[key] for row in found], points, marker=marker, label=model)
        axes[1, column].set(xscale="log", xlabel=axis_name)
        ticks = sorted({getattr(case, key) for case in cases})
        labels = [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks]
        axes[1, column].set_xticks(ticks, labels)
        axes[1, column].minorticks_off()
    axes[0, 0].set(title="length 2,048", ylabel="thousand tokens/s")
    axes[0, 1].set(title="65,536 tokens a step")
    axes[1, 0].set(ylabel="peak memory, GiB")
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False)
    figure.suptitle(f"training steps, bfloat16 autocast, one {gpu}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=[""], help="starts of names of cases")
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, help="these in place of the table")
    parser.add_argument("--repeats", type=int, help="steps timed; 15, on a CPU 7")
    parser.add_argument(
        "--compile", nargs="*", default=["transformer"], help="starts of names of models to compile"
    )
    parser.add_argument(
        "--graph",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a step as one CUDA graph",
    )
    parser.add_argument("--json", type=Path, help="add the results to this file")
    parser.add_argument("--plot", type=Path, help="draw the sweeps, with those of the file")
    parser.add_argument(
        "--draw", type=Path, help="measure nothing; --plot the results of this file"
    )
    parser.add_argument("--commit", help="name of the commit, where git cannot tell")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument(
        "--peers", action="store_true", help="on a CPU: transformers too, minutes a step"
    )
    arguments = parser.parse_args()
    if arguments.draw:
        results = json.loads(arguments.draw.read_text(encoding="utf-8"))
        plot(results["rows"], results["environment"]["gpu"], arguments.plot)
        return
    if arguments.device == "cpu":
        measure_on_cpu(arguments.repeats or 7, arguments.peers, arguments.json)
        return

    known = gpu_environment(arguments.commit)
    print("\n".join(f"{name}: {value}" for name, value in known.items()), flush=True)
    candidates = [c for name in arguments.sweep or [] for c in SWEEPS[name]] or CASES
    rows = []
    for case in candidates:
        if any(case.name.startswith(start) for start in arguments.cases):
            rows.append(measure(case, arguments.repeats or 15, arguments.compile, arguments.graph))
            print("  ".join(cells(rows[-1])), flush=True)
            if arguments.json:  # After each, so that what was measured stays if time runs out.
                merge(arguments.json, known, rows, "case")
    header = ["", "tokens/s", "spread", "peak GiB", "MFU"]
    print_table("whole steps, bf16 autocast, AdamW", header, [cells(row) for row in rows])
    if arguments.plot:
        if arguments.json:
            rows = json.loads(arguments.json.read_text(encoding="utf-8"))["rows"]
        plot(rows, known["gpu"], arguments.plot)


if __name__ == "__main__":
    main()
