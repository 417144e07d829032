"""Speed of reading a prompt and of writing, 130M model with random weights, float32.

    python benchmarks/generation.py          # the tables
    python benchmarks/generation.py --json benchmarks/results/generation-cpu.json

Also the products of a decoding step: `linear_step` beside PyTorch's, for every matrix of the model.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mambakit.models import MambaLanguageModel, preset
from mambakit.ops.linear import linear_step
from report import Measurement, environment, measure, print_table, save

PROMPT, ROUNDS, STEPS = 512, 6, 12
BATCHES = (1, 4, 8)


def reading(model: MambaLanguageModel) -> Measurement:
    """Prompt tokens a second."""
    tokens = torch.randint(model.config.vocab_size, (1, PROMPT))
    return measure(lambda: model.prefill(tokens), repeats=7).rate(PROMPT)


def writing(model: MambaLanguageModel, batch: int) -> tuple[Measurement, Measurement]:
    """Tokens a second over all sequences of the batch; steps a second if PyTorch summed up as many numbers as weights.

    The sum goes at the speed of the memory. The two take turns, since on a shared machine that changes.
    """
    state = model.initial_state(batch)
    tokens = torch.randint(model.config.vocab_size, (batch,))
    model.step(tokens, state)
    numbers = torch.ones(model.num_parameters())
    steps, sums = [], []
    for _ in range(ROUNDS):
        time.sleep(
            0.05
        )  # PyTorch's threads spin for a while after the sum, in the way of the next step's.
        for times, function in ((steps, lambda: model.step(tokens, state)), (sums, numbers.sum)):
            for _ in range(STEPS):
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
    return Measurement.of(steps).rate(batch), Measurement.of(sums).rate(1)


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
    results: dict[str, Any] = {"environment": environment()}
    rate = reading(model)
    results[f"prompt of {PROMPT}"] = asdict(rate)
    speeds = [(f"prompt of {PROMPT}", f"{rate.median:.1f}", f"±{rate.spread:.0%}", "")]
    for batch in BATCHES:
        rate, roof = writing(model, batch)
        results[f"decode, batch {batch}"] = {**asdict(rate), "memory_steps": asdict(roof)}
        share = rate.median / batch / roof.median
        name = f"decode, batch {batch}"
        speeds.append((name, f"{rate.median:.1f}", f"±{rate.spread:.0%}", f"{share:.0%}"))
    header = ("", "tokens/s", "spread", "of the memory's speed")
    print_table("130M parameters, float32", header, speeds)

    table = []
    mixer = model.backbone.layers[0].mixer
    matrices = ("in_proj", "x_proj", "dt_proj", "out_proj")
    for name, layer in {**{n: getattr(mixer, n) for n in matrices}, "head": model.lm_head}.items():
        for rows in BATCHES:
            rates = products(layer.weight.detach(), rows)
            table.append((name, str(rows), *(f"{rate.median / 1e9:.1f}" for rate in rates)))
            results[f"{name}, {rows} rows"] = [asdict(rate) for rate in rates]
    print_table("products of a step, GB/s", ("matrix", "rows", "PyTorch", "linear_step"), table)
    if path is not None:
        save(path, results)


if __name__ == "__main__":
    main()
