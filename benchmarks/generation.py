"""Generation with the engine: Mamba beside a Transformer of the same size, over the batch and over the prompt's length.

    python benchmarks/generation.py                                    # 130M, on the GPU if there is one
    python benchmarks/generation.py --mamba 1.4b --transformer 1.3b    # other sizes
    python benchmarks/generation.py --batches 1 8 --lengths 1024 4096  # parts of it
    python benchmarks/generation.py --json benchmarks/results/decoding-gpu.json --plot docs/pictures/decoding-gpu.png
    python benchmarks/generation.py --draw results.json --plot picture.png   # no GPU needed
    python benchmarks/generation.py --device cpu --json benchmarks/results/generation-cpu.json

Random weights; bfloat16 on a GPU, float32 on a CPU. A step is one token for every sequence of the batch, greedy, and
ends when the host has it (of the step before, on a GPU). Mamba runs in `Engine`. The Transformer has read 2,048 tokens;
its step, argmax included, is a CUDA graph on a GPU. Medians of 128 steps (32 on a CPU). The roof is the time in which
the memory moves Mamba's weights once and its states twice. Prompts of 2,048 tokens are read by the models themselves,
all of a batch at once; *first_token* is one such prompt in the engine, in its chunks, until the host has a token.
On a CPU follow the formats of the weights, and llama.cpp with the same weights: see `cpu_generation.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cpu_generation import compare_formats
from gpu import copy_bandwidth, gpu_environment
from mambakit.generate import Engine, Prefix, Request, SamplingOptions
from mambakit.generate.prefix import state_bytes
from mambakit.models import (
    TRANSFORMER_PRESETS,
    MambaLanguageModel,
    TransformerLanguageModel,
    preset,
)
from report import Measurement, environment, measure, print_table, save

PROMPT = 2048
DEFAULTS = {
    "cuda": {"batches": [2**n for n in range(9)], "lengths": [4**n for n in range(5, 11)], "prompts": [1, 64]},
    "cpu": {"batches": [1, 4, 16], "lengths": [1024, 4096, 16384], "prompts": [1]},
}  # fmt: skip
GREEDY = SamplingOptions(temperature=0)
ENDLESS = 10**9


def mamba_steps(model: MambaLanguageModel, batch: int, steps: int) -> Measurement:
    """Seconds of a step. What was read does not matter to it, so prompts are one token."""
    engine = Engine(model, slots=batch)
    handles = [
        engine.submit(Request(prompt=[n], options=GREEDY, max_tokens=ENDLESS)) for n in range(batch)
    ]
    return timed(engine.step, steps, lambda: all(not handle.done for handle in handles))


def after_prompt(model: MambaLanguageModel, length: int, steps: int) -> Measurement:
    """Seconds of a step after a prompt of so many tokens."""
    prompt = torch.randint(model.config.vocab_size, (length - 1,))
    prefix = Prefix.read(model, prompt)
    engine = Engine(model, slots=1)
    handle = engine.submit(Request(prompt=[1], prefix=prefix, options=GREEDY, max_tokens=ENDLESS))
    return timed(engine.step, steps, lambda: bool(handle.poll()))


def transformer_steps(model: TransformerLanguageModel, batch: int, steps: int) -> Measurement:
    """Seconds of a step after a prompt of `PROMPT` tokens (whose keys and values are zeros)."""
    state = model.initial_state(batch, PROMPT + 2 * steps + 8)
    tokens = torch.zeros(batch, dtype=torch.int64, device=state.position.device)

    def step() -> None:
        tokens.copy_(model.step(tokens, state)[:, : model.config.vocab_size].argmax(-1))

    if not tokens.is_cuda:
        state.position.fill_(PROMPT)
        return timed(step, steps, lambda: True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    state.position.fill_(PROMPT)

    def replay() -> None:
        graph.replay()
        tokens.tolist()

    return timed(replay, steps, lambda: True)


def reading(model: MambaLanguageModel | TransformerLanguageModel, batch: int) -> Measurement:
    """Seconds that prompts of `PROMPT` tokens take, one for each sequence of the batch."""
    device = next(model.parameters()).device
    tokens = torch.randint(model.config.vocab_size, (batch, PROMPT), device=device)

    def read() -> None:
        model.prefill(tokens)[0].argmax(-1).tolist()

    return measure(read, repeats=5)


def first_token(model: MambaLanguageModel) -> Measurement:
    """Seconds from a request with `PROMPT` tokens to its first token, in an engine that has nothing else to do."""
    engine = Engine(model, slots=1)
    prompt = torch.randint(model.config.vocab_size, (PROMPT,))
    request = Request(prompt=prompt, options=GREEDY, max_tokens=1)
    return measure(lambda: engine.submit(request).result(), repeats=5)


def timed(step: Callable[[], Any], steps: int, is_ready: Callable[[], bool]) -> Measurement:
    """Seconds between the ends of steps, once everything is under way."""
    while True:
        step()
        if is_ready():
            break
    step()
    samples = []
    last = time.perf_counter()
    for _ in range(steps):
        step()
        now = time.perf_counter()
        samples.append(now - last)
        last = now
    return Measurement.of(samples)


def or_no_memory(function: Callable[[], Measurement]) -> Measurement | None:
    """The measurement, or None if it does not fit into the GPU."""
    try:
        return function()
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def bandwidth(device: str) -> float:
    """Bytes that the memory moves in a second."""
    if device == "cuda":
        return copy_bandwidth()
    numbers = torch.ones(2**27)
    return measure(numbers.sum, repeats=5).rate(numbers.nbytes).median


def row(name: str, steps: Measurement | None, batch: int) -> dict[str, Any]:
    """A line of the results."""
    if steps is None:
        return {"case": name, "failed": "out of memory"}
    rate = batch / steps.median
    return {"case": name, "ms": steps.median * 1e3, "spread": steps.spread, "tokens_per_s": rate}


def cells(line: dict[str, Any]) -> list[str]:
    """It as text."""
    if "failed" in line:
        return [line["case"], line["failed"], "", "", ""]
    roof = f"{line['roof_ms']:.3f}" if "roof_ms" in line else ""
    rate = f"{line['tokens_per_s']:,.0f}"
    return [line["case"], f"{line['ms']:.3f}", f"±{line['spread']:.0%}", rate, roof]


def plot(rows: list[dict[str, Any]], where: str, path: Path) -> None:
    """Tokens/s over the batch with the roof, and milliseconds a step over the length of the prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (over_batch, over_length) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    curves: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for found in rows:
        model, what, count = re.fullmatch(r"(.+), (\w+) (\d+)", found["case"]).groups()  # type: ignore[union-attr]
        if "failed" not in found:
            curves.setdefault((model, what), {})[int(count)] = found
    for (model, what), points in curves.items():
        marker = "o" if model.startswith("mamba") else "s"
        if what == "batch":
            rates = [point["tokens_per_s"] for point in points.values()]
            [line] = over_batch.plot([*points], rates, marker=marker, label=model)
            if model.startswith("mamba"):
                roofs = [batch / point["roof_ms"] * 1e3 for batch, point in points.items()]
                style = {"ls": ":", "color": line.get_color(), "label": f"roof of {model}"}
                over_batch.plot([*points], roofs, **style)
        elif what == "prompt":
            times = [point["ms"] for point in points.values()]
            over_length.plot([*points], times, marker=marker, label=model)
    over_batch.set(
        xscale="log",
        yscale="log",
        xlabel="batch",
        ylabel="tokens/s",
        title=f"after {PROMPT:,} tokens",
    )
    over_batch.set_xticks(ticks := [2**n for n in range(0, 9)], [str(tick) for tick in ticks])
    over_length.set(
        xscale="log", xlabel="tokens of the prompt", ylabel="ms a step", title="batch 1"
    )
    ticks = sorted(
        {count for (_, what), points in curves.items() if what == "prompt" for count in points}
    )
    over_length.set_xticks(ticks, [f"{n // 1024}k" if n < 2**20 else f"{n >> 20}M" for n in ticks])
    over_length.set_ylim(0, 1.2 * over_length.get_ylim()[1])
    for axis in (over_batch, over_length):
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(f"decoding, {where}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=found)
    parser.add_argument("--mamba", default="130m")
    parser.add_argument("--transformer", default="125m")
    parser.add_argument("--batches", type=int, nargs="*")
    parser.add_argument("--lengths", type=int, nargs="*")
    parser.add_argument("--prompts", type=int, nargs="*", help="how many are read at once")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--draw", type=Path, help="measure nothing; --plot the rows of this file")
    parser.add_argument("--commit", help="if the repository's history is not at hand")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for name, values in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, values)
    return options


@torch.no_grad()
def main() -> None:
    options = arguments()
    device = options.device
    dtype, steps = (torch.bfloat16, 128) if device == "cuda" else (torch.float32, 32)
    if options.draw:
        results = json.loads(options.draw.read_text(encoding="utf-8"))
        plot(results["rows"], where(results["environment"]), options.plot)
        return
    torch.manual_seed(0)
    with torch.device(device):
        mamba = MambaLanguageModel(preset(options.mamba)).to(dtype)
        transformer = TransformerLanguageModel(TRANSFORMER_PRESETS[options.transformer]).to(dtype)
    weights = sum(parameter.nbytes for parameter in mamba.parameters())
    state, speed = state_bytes(mamba.initial_state(1)), bandwidth(device)

    lines = []
    for batch in options.batches:
        line = row(f"mamba {options.mamba}, batch {batch}", mamba_steps(mamba, batch, steps), batch)
        lines.append({**line, "roof_ms": (weights + 2 * batch * state) / speed * 1e3})
        steps_of = or_no_memory(lambda: transformer_steps(transformer, batch, steps))  # noqa: B023
        lines.append(row(f"transformer {options.transformer}, batch {batch}", steps_of, batch))
    for length in options.lengths:
        line = row(f"mamba {options.mamba}, prompt {length}", after_prompt(mamba, length, steps), 1)
        lines.append({**line, "roof_ms": (weights + 2 * state) / speed * 1e3})
    for batch in options.prompts:
        for name, model in (
            (f"mamba {options.mamba}", mamba),
            (f"transformer {options.transformer}", transformer),
        ):
            found = or_no_memory(lambda: reading(model, batch))  # noqa: B023
            line = row(f"{name}, reading {batch}", found, batch * PROMPT)
            lines.append(line)
    if 1 in options.prompts:
        line = row(f"mamba {options.mamba}, first_token {PROMPT}", first_token(mamba), PROMPT)
        lines.append(line)
    header = ("", "ms/step", "spread", "tokens/s", "roof, ms")
    print_table(f"decoding on {device}, {dtype}", header, [cells(line) for line in lines])
    known = gpu_environment(options.commit) if device == "cuda" else environment()
    results = {"environment": known, "rows": lines}
    if device == "cpu":
        results |= compare_formats(options.mamba)
    if options.json is not None:
        save(options.json, results)
    if options.plot is not None:
        plot(lines, where(known), options.plot)


def where(known: dict[str, Any]) -> str:
    """The device and the dtype, for a title."""
    return f"bfloat16, one {known['gpu']}" if "gpu" in known else f"float32, {known['processor']}"


if __name__ == "__main__":
    main()
