"""transformers' Mamba on the CPU, before and after `mambakit.compat.install()`: 130M shape, float32.

python benchmarks/transformers_speedup.py        # the table; a training step of theirs: ten minutes or more, 12 GB
python benchmarks/transformers_speedup.py --only prompt decode    # in two minutes
python benchmarks/transformers_speedup.py --json benchmarks/results/transformers-speedup-cpu.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MambaConfig, MambaForCausalLM

import mambakit.compat
from report import Measurement, environment, measure, print_table, save

SHAPE = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}
STEPS = 12
"""Decoding steps of a sample."""


def train(model: MambaForCausalLM, tokens: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward."""

    def step() -> None:
        model.train().zero_grad(set_to_none=True)
        model(tokens, labels=tokens).loss.backward()

    return step


def read(model: MambaForCausalLM, tokens: torch.Tensor) -> Callable[[], Any]:
    """A prompt, whose last logits and cache are wanted."""

    @torch.no_grad()
    def prefill() -> Any:
        return model.eval()(tokens, use_cache=True, logits_to_keep=1)

    return prefill


def write(model: MambaForCausalLM, tokens: torch.Tensor, repeats: int) -> Measurement:
    """Seconds of a decoding step."""
    model.eval()
    times = []
    with torch.no_grad():
        cache = model(tokens[:, :8], use_cache=True).cache_params
        for _ in range(STEPS * repeats + 1):
            start = time.perf_counter()
            model(tokens[:, :1], use_cache=True, cache_params=cache)
            times.append(time.perf_counter() - start)
    return Measurement.of(times[1:])


CASES = ("train", "prompt", "decode")


def measured(
    model: MambaForCausalLM, tokens: torch.Tensor, cases: list[str], repeats: dict[str, int]
) -> dict[str, Measurement]:
    """Seconds of each kind of work. Theirs are not warmed up in training: it has nothing to compile."""
    results = {}
    if "train" in cases:
        warmups = 1 if repeats["train"] > 1 else 0
        results["train 1 x 512"] = measure(train(model, tokens), repeats["train"], warmups)
    if "prompt" in cases:
        results["prompt of 512"] = measure(read(model, tokens), repeats["prompt"])
    if "decode" in cases:
        results["decode, batch 1"] = write(model, tokens, repeats["decode"])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    arguments = parser.parse_args()
    path, cases = arguments.json, arguments.only
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(**SHAPE))
    tokens = torch.randint(SHAPE["vocab_size"], (1, 512))

    theirs = measured(model, tokens, cases, {"train": 1, "prompt": 3, "decode": 3})
    mambakit.compat.install()
    ours = measured(model, tokens, cases, {"train": 5, "prompt": 7, "decode": 6})

    results: dict[str, Any] = {
        "environment": {**environment(), "transformers": transformers.__version__}
    }
    table = []
    for name, slow in theirs.items():
        fast = ours[name]
        ratio = slow.median / fast.median
        results[name] = {"transformers": asdict(slow), "mambakit": asdict(fast), "ratio": ratio}
        seconds = (f"{m.median:.3f} ±{m.spread:.0%}" for m in (slow, fast))
        table.append((name, *seconds, f"{ratio:.1f}"))
    print_table(
        "130M parameters, float32, seconds", ("", "transformers", "with mambakit", "ratio"), table
    )
    if path is not None:
        save(path, results)


if __name__ == "__main__":
    main()
