"""Speed of reading a prompt and of writing on the CPU for every format of the weights; a part of generation.py.

Beside it llama.cpp with the same weights, where llama-cpp-python is installed (pip builds it with a compiler). Also the
products of a decoding step: `linear_step` beside PyTorch's, for every matrix of the model in float32.
"""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import llama_cpp_speed
from mambakit.models import MambaLanguageModel, Quantisation, preset, quantise
from mambakit.ops.linear import linear_step
from report import Measurement, measure, print_table

PROMPT, ROUNDS, STEPS = 512, 6, 12
BATCHES = (1, 4, 8)
FORMATS = ("float32", "bfloat16", "int8", "int4")
"""Of the weights."""


def in_format(model: MambaLanguageModel, name: str) -> MambaLanguageModel:
    """A copy of the model with its weights in one of `FORMATS`."""
    model = deepcopy(model)
    if name.startswith("int"):
        quantise(model, Quantisation(bits=int(name[3:])))
        return model
    return model.to(getattr(torch, name))


def weight_bytes(model: MambaLanguageModel) -> int:
    """Bytes of all weights; a tied head counts once."""
    tensors = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    return sum(tensors.values())


def reading(model: MambaLanguageModel) -> Measurement:
    """Prompt tokens a second."""
    tokens = torch.randint(model.config.vocab_size, (1, PROMPT))
    return measure(lambda: model.prefill(tokens), repeats=7).rate(PROMPT)


def writing(model: MambaLanguageModel, batch: int) -> tuple[Measurement, Measurement]:
    """Tokens a second over all sequences of the batch; steps a second if PyTorch summed up as many bytes as weights.

    The sum, of float32, goes at the speed of the memory. The two take turns, since on a shared machine that changes.
    """
    state = model.initial_state(batch)
    tokens = torch.randint(model.config.vocab_size, (batch,))
    step = model.prepared_step(state)  # As the engine does.
    step(tokens)
    numbers = torch.ones(weight_bytes(model) // 4)
    steps, sums = [], []
    for _ in range(ROUNDS):
        time.sleep(
            0.05
        )  # PyTorch's threads spin for a while after the sum, in the way of the next step's.
        for times, function in ((steps, lambda: step(tokens)), (sums, numbers.sum)):
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


def compare_formats(name: str) -> dict[str, Any]:
    """Prints the tables, for a preset with random weights; what was measured by format, and by matrix."""
    torch.manual_seed(0)
    model = MambaLanguageModel(preset(name))
    results: dict[str, Any] = {}
    speeds = []
    for form in FORMATS:
        changed = in_format(model, form)
        size = weight_bytes(changed)
        found: dict[str, Any] = {"weight_bytes": size}
        rate = reading(changed)
        found[f"prompt of {PROMPT}"] = asdict(rate)
        cells = [form, f"{size / 1e6:.0f}", f"{rate.median:.0f} ±{rate.spread:.0%}"]
        for batch in BATCHES:
            rate, roof = writing(changed, batch)
            found[f"decode, batch {batch}"] = {**asdict(rate), "memory_steps": asdict(roof)}
            cells.append(f"{rate.median:.1f} ±{rate.spread:.0%}")
            if batch == 1:
                cells.append(f"{roof.median:.0f}")
        results[form] = found
        speeds.append(cells)
    if llama_cpp_speed.is_installed():
        for form in llama_cpp_speed.NAMES:
            rates = llama_cpp_speed.llama_cpp_speeds(model, form, PROMPT, ROUNDS * STEPS)
            results[f"llama.cpp, {form}"] = {
                f"prompt of {PROMPT}": asdict(rates[0]), "decode, batch 1": asdict(rates[1])
            }  # fmt: skip
            cells = [f"{rate.median:.1f} ±{rate.spread:.0%}" for rate in rates]
            speeds.append([f"llama.cpp, {form}", "", *cells, "", "", ""])
    batches = [f"batch {batch}" for batch in BATCHES]
    header = ("weights", "MB", f"prompt of {PROMPT}", batches[0], "roof", *batches[1:])
    print_table(f"{name}, tokens/s", header, speeds)

    table = []
    mixer = model.backbone.layers[0].mixer
    matrices = ("in_proj", "x_proj", "dt_proj", "out_proj")
    for matrix, layer in {
        **{n: getattr(mixer, n) for n in matrices},
        "head": model.lm_head,
    }.items():
        for rows in BATCHES:
            rates = products(layer.weight.detach(), rows)
            table.append((matrix, str(rows), *(f"{rate.median / 1e9:.1f}" for rate in rates)))
            results[f"{matrix}, {rows} rows"] = [asdict(rate) for rate in rates]
    print_table("products of a step, GB/s", ("matrix", "rows", "PyTorch", "linear_step"), table)
    return results
