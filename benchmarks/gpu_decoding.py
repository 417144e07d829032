"""Time of a decoding step on one GPU: Mamba beside a Transformer of the same size, in bfloat16.

    python benchmarks/gpu_decoding.py                               # the table; see MODELS and BATCHES
    python benchmarks/gpu_decoding.py --models mamba-130m --batches 1 8
    python benchmarks/gpu_decoding.py --kernels mamba-1.4b --batches 1 64   # each kernel by itself, beside PyTorch's
    python benchmarks/gpu_decoding.py --models mamba-1.4b --batches 8 64 --fewest 5 65
    python benchmarks/gpu_decoding.py --json results.json           # rows of the same commit and GPU are kept

A step is one CUDA graph: `model.step`, and the most probable token, which is the input of the next. Weights are random.
The Transformer has read 2,048 tokens and writes into memory for 2,112; Mamba's time does not depend on what it has
read. The roof is the time that the device's copy takes to move as many bytes: all weights, all of Mamba's states read
and written, the Transformer's keys and values read. No speed without parity: the first step's logits are compared with
those of the modules. Medians of steps timed by events; the spread is half the range of the middle half.

`--fewest` sets `tensor_core_products.FEWEST_ROWS`: from how many rows of the batch on products are on tensor cores.
With 65 none is, and a step of more than 8 rows takes PyTorch's products. `--most-rows` sets
`many_rows_step.MOST_ROWS`: up to how many rows a step is one kernel; with 0 more than 8 are never. Each value is a row
of the table.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu import gpu_environment, merge, size
from mambakit.models import (
    PRESETS,
    TRANSFORMER_PRESETS,
    MambaLanguageModel,
    ModelState,
    TransformerLanguageModel,
)
from mambakit.models.fused_step import _layer, _modules
from mambakit.ops.cuda import many_rows_step, model_step, tensor_core_products
from mambakit.ops.cuda.step_products import are_for_tensor_cores
from report import Measurement, print_table

MODELS: dict[str, Callable[[], MambaLanguageModel | TransformerLanguageModel]] = {
    "mamba-130m": lambda: MambaLanguageModel(PRESETS["130m"]),
    "transformer-125m": lambda: TransformerLanguageModel(TRANSFORMER_PRESETS["125m"]),
    "mamba-1.4b": lambda: MambaLanguageModel(PRESETS["1.4b"]),
    "transformer-1.3b": lambda: TransformerLanguageModel(TRANSFORMER_PRESETS["1.3b"]),
    "mamba-2.8b": lambda: MambaLanguageModel(PRESETS["2.8b"]),
    "transformer-2.7b": lambda: TransformerLanguageModel(TRANSFORMER_PRESETS["2.7b"]),
}
BATCHES = (1, 8, 64, 128)
PROMPT, ROOM = 2048, 2112
WARM, STEPS = 10, 50
PARITY = 0.02
"""Of the logits, relative; two ways to compute in bfloat16 differ by about 0.01."""


def make(name: str) -> MambaLanguageModel | TransformerLanguageModel:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return MODELS[name]().bfloat16().requires_grad_(False)


def times_of(step: Callable[[], Any], rewind: Callable[[], Any] = lambda: None) -> Measurement:
    """Seconds of a step, replayed as a graph; `rewind` is called before the first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    rewind()
    for _ in range(WARM):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return Measurement.of([a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)])


def numbers(state: ModelState) -> list[Tensor]:
    return [tensor for layer in state.layers for tensor in (layer.conv_state, layer.ssm_state)]


@torch.no_grad()
def require_parity(model: MambaLanguageModel, tokens: Tensor, state: ModelState) -> float:
    """How far the step's logits are from those of the modules."""
    expected = model.lm_head(model.backbone.step(tokens, state.clone())).float()
    found = model.step(tokens, state.clone()).float()
    distance = float((found - expected).norm() / expected.norm())
    if not distance <= PARITY:
        raise SystemExit(f"the step is {distance:.3f} away from the modules; no speed")
    return distance


@torch.no_grad()
def decode(name: str, batch: int, bandwidth: float) -> dict[str, Any]:
    """One row of the table; raises `torch.cuda.OutOfMemoryError`."""
    model = make(name)
    tokens = torch.randint(model.config.vocab_size, (batch,), device="cuda")
    row: dict[str, Any] = {}
    if isinstance(model, MambaLanguageModel):
        state: Any = model.initial_state(batch)
        for tensor in numbers(state):
            tensor.normal_()
        row["distance"] = require_parity(model, tokens, state)
        moved = 2 * size(*numbers(state))
    else:
        state = model.initial_state(batch, ROOM)
        for layer in state.layers:
            layer.keys.normal_()
            layer.values.normal_()
        caches = size(*(t for layer in state.layers for t in (layer.keys, layer.values)))
        moved = caches * (PROMPT + ROOM) // (2 * ROOM)
        state.position.fill_(PROMPT)

    def step() -> None:
        tokens.copy_(model.step(tokens, state).argmax(-1))

    def rewind() -> None:
        if isinstance(model, TransformerLanguageModel):
            state.position.fill_(PROMPT)

    seconds = times_of(step, rewind)
    moved += size(*model.parameters())
    return row | {
        "parameters": model.num_parameters(),
        "ms": 1e3 * seconds.median,
        "spread": seconds.spread,
        "tokens_per_s": batch / seconds.median,
        "roof_ms": 1e3 * moved / bandwidth,
    }


def measure(
    name: str, batch: int, bandwidth: float, fewest: int | None, most: int | None
) -> dict[str, Any]:
    """One row: the numbers of `decode`, or that it does not fit."""
    row: dict[str, Any] = {"case": f"{name} batch {batch}", "model": name, "batch": batch}
    if fewest is not None:
        tensor_core_products.FEWEST_ROWS = fewest
        row |= {"case": f"{row['case']}, tensor cores from {fewest} rows on", "fewest": fewest}
    if most is not None:
        many_rows_step.MOST_ROWS = most
        row |= {"case": f"{row['case']}, one kernel up to {most} rows", "most_rows": most}
    try:
        row |= decode(name, batch, bandwidth)
    except torch.cuda.OutOfMemoryError:
        row["error"] = "does not fit"
    gc.collect()
    torch.cuda.empty_cache()
    return row


@torch.no_grad()
def kernels(name: str, batch: int) -> dict[str, tuple[Measurement, int]]:
    """Seconds of each kernel in all layers one after the other, and the bytes that it must move."""
    model = make(name)
    assert isinstance(model, MambaLanguageModel)
    state = model.initial_state(batch)
    layers = [*map(_layer, map(_modules, model.backbone.blocks()), state.layers)]
    tokens = torch.zeros(batch, dtype=torch.int64, device="cuda")
    embedding, norm = model.backbone.embedding.weight, model.backbone.norm_f.weight
    head = model.lm_head.weight
    residual = model_step.embed(tokens, embedding, norm)
    x, z = model_step.in_proj(layers[0], residual, 1e-5)
    are_few = not are_for_tensor_cores(layers[0], batch)
    kept = torch.float32 if are_few else x.dtype
    steering = model_step.project(layers[0].x_proj, x, kept)
    low = steering[:, : layers[0].dt_proj.shape[1]]
    dt = None if are_few else model_step.project(layers[0].dt_proj, low, x.dtype)
    runs: dict[str, tuple[Callable[[Any], Any], Callable[[Any], int]]] = {
        "in_proj": (
            lambda layer: model_step.in_proj(layer, residual, 1e-5, overlaps=True),
            lambda layer: size(layer.in_proj, layer.conv, *[layer.conv_state] * 2),
        ),
        "x_proj": (
            lambda layer: model_step.project(layer.x_proj, x, kept, overlaps=True),
            lambda layer: size(layer.x_proj),
        ),
        "scan": (
            lambda layer: model_step.scan(layer, x, z, steering, dt, overlaps=True),
            lambda layer: size(layer.A_log, *[layer.dt_proj] * are_few, *[layer.ssm_state] * 2),
        ),
        "out_proj": (
            lambda layer: model_step.out_proj(layer, x, residual, norm, overlaps=True),
            lambda layer: size(layer.out_proj),
        ),
    }
    if not are_few:
        runs["dt_proj"] = (
            lambda layer: model_step.project(layer.dt_proj, low, x.dtype, overlaps=True),
            lambda layer: size(layer.dt_proj),
        )
        of_library = {"in_proj": residual.scaled, "x_proj": x, "dt_proj": low, "out_proj": x}
        for key, factor in of_library.items():
            runs[f"{key}, PyTorch's product"] = (
                lambda layer, key=key, factor=factor: factor @ getattr(layer, key).t(),
                lambda layer, key=key: size(getattr(layer, key)),
            )
    found = {
        key: (
            times_of(lambda run=run: [run(layer) for layer in layers]),
            sum(map(bytes_of, layers)),
        )
        for key, (run, bytes_of) in runs.items()
    }
    found["head"] = times_of(lambda: model_step.logits_of(head, residual, 1e-5)), size(head)
    if not are_few:
        found["head, PyTorch's product"] = times_of(lambda: residual.scaled @ head.t()), size(head)
    return found


def print_kernels(
    name: str, batches: list[int], bandwidth: float, fewest: int | None
) -> list[dict[str, Any]]:
    if fewest is not None:
        tensor_core_products.FEWEST_ROWS = fewest
    rows, table = [], []
    for batch in batches:
        for kernel, (seconds, moved) in kernels(name, batch).items():
            case, rate = f"{name} batch {batch} {kernel}", moved / seconds.median
            rows.append({"case": case, **asdict(seconds), "bytes": moved})
            cells = f"{1e6 * seconds.median:.1f}", f"±{seconds.spread:.0%}", f"{rate / 1e9:.0f}"
            table.append((case, *cells, f"{rate / bandwidth:.0%}"))
    header = ("kernel, all layers", "us", "spread", "GB/s", "of the copy's speed")
    print_table("kernels one after the other", header, table)
    return rows


def print_steps(rows: list[dict[str, Any]]) -> None:
    table = []
    for row in rows:
        cells = (row.get("error", ""), "", "", "", "")
        if "ms" in row:
            ms, roof = row["ms"], row["roof_ms"]
            speed = f"{row['tokens_per_s']:.0f}"
            cells = (f"{ms:.3f}", f"±{row['spread']:.0%}", speed, f"{roof:.3f}", f"{roof / ms:.0%}")
        table.append((row["case"], *cells))
    header = ("", "ms a step", "spread", "tokens/s", "roof, ms", "of the roof")
    print_table("a decoding step, bfloat16", header, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="prefixes of names")
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--fewest", nargs="+", type=int, default=[None], metavar="ROWS")
    parser.add_argument("--most-rows", nargs="+", type=int, default=[None], metavar="ROWS")
    parser.add_argument("--kernels", metavar="MODEL", help="each kernel of this model instead")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="where there is no git history, the commit")
    options = parser.parse_args()

    environment = gpu_environment(options.commit)
    bandwidth = 1e9 * environment["copy_gb_per_s"]
    if options.kernels:
        rows = print_kernels(options.kernels, options.batches, bandwidth, options.fewest[0])
    else:
        names = [name for name in MODELS if name.startswith(tuple(options.models))]
        rows = [
            measure(name, batch, bandwidth, fewest, most)
            for batch in options.batches
            for name in names
            for fewest in options.fewest
            for most in options.most_rows
        ]
        print_steps(rows)
    if options.json is not None:
        merge(options.json, environment, rows, key="case")


if __name__ == "__main__":
    main()
