"""Speed of reading a prompt and of writing, 130M model with random weights, float32.

    python benchmarks/generation.py          # the tables
    python benchmarks/generation.py --json benchmarks/results/generation-cpu.json

Also the products of a decoding step: `linear_step` beside PyTorch's, for every matrix of the model.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mambakit.models import MambaLanguageModel, preset
from mambakit.ops.linear import linear_step
from report import Measurement, environment, measure, save

PROMPT, STEPS = 512, 32
BATCHES = (1, 4, 8)


def reading(model: MambaLanguageModel) -> Measurement:
    """Prompt tokens a second."""
    tokens = torch.randint(model.config.vocab_size, (1, PROMPT))
    return measure(lambda: model.prefill(tokens), repeats=7).rate(PROMPT)


def writing(model: MambaLanguageModel, batch: int) -> Measurement:
    """Tokens a second, over all sequences of the batch."""
    state = model.initial_state(batch)
    tokens = torch.randint(model.config.vocab_size, (batch,))

    def steps() -> None:
        for _ in range(STEPS):
            model.step(tokens, state)

    return measure(steps, repeats=7).rate(STEPS * batch)


@torch.no_grad()
def products(weight: torch.Tensor, rows: int) -> tuple[Measurement, Measurement]:
    """Bytes of the matrix read a second: by PyTorch, by `linear_step`."""
    # Enough copies that none is still in the cache when its turn comes again.
    weights = [weight.clone() for _ in range(-(-(2**28) // (4 * weight.numel())))]
    x = torch.randn(rows, weight.shape[1])

    def all_of(product: Any) -> None:
        for copy in weights:
            product(x, copy)

    size = 4 * weight.numel() * len(weights)
    torch_product = torch.nn.functional.linear
    return tuple(  # type: ignore[return-value]
        measure(partial(all_of, product), repeats=5).rate(size)
        for product in (torch_product, linear_step)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    path = parser.parse_args().json

    torch.manual_seed(0)
    model = MambaLanguageModel(preset("130m"))
    console = Console()
    results: dict[str, Any] = {"environment": environment()}

    speeds = Table("", "tokens/s", "spread", title="130M parameters, float32")
    cases = {f"prompt of {PROMPT}": partial(reading, model)}
    cases |= {f"decode, batch {batch}": partial(writing, model, batch) for batch in BATCHES}
    for name, case in cases.items():
        rate = case()
        speeds.add_row(name, f"{rate.median:.1f}", f"{100 * rate.spread:.0f} %")
        results[name] = asdict(rate)
    console.print(speeds)

    table = Table("matrix", "rows", "PyTorch", "linear_step", title="products of a step, GB/s")
    mixer = model.backbone.layers[0].mixer
    matrices = ("in_proj", "x_proj", "dt_proj", "out_proj")
    for name, layer in {**{n: getattr(mixer, n) for n in matrices}, "head": model.lm_head}.items():
        for rows in BATCHES:
            rates = products(layer.weight.detach(), rows)
            table.add_row(name, str(rows), *(f"{rate.median / 1e9:.1f}" for rate in rates))
            results[f"{name}, {rows} rows"] = [asdict(rate) for rate in rates]
    console.print(table)
    if path is not None:
        save(path, results)


if __name__ == "__main__":
    main()
