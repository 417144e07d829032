"""Speed of training the 130M model on the CPU: forward and backward of 1 x 512 tokens, and the optimizer step.

A part of training.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.models import MambaLanguageModel, preset
from mambakit.ops.cpu.features import slow_bfloat16
from report import Measurement, environment, print_table, save

SEQLEN = 512
Loss = Callable[[Tensor], Tensor]


def ours() -> tuple[nn.Module, Loss]:
    model = MambaLanguageModel(preset("130m"))
    return model, lambda tokens: model.loss(tokens[:, :-1], tokens[:, 1:])[0]


def transformers() -> tuple[nn.Module, Loss]:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=50280, use_mambapy=False)
    )
    return model, lambda tokens: model(tokens[:, :-1], labels=tokens[:, :-1]).loss


def measure_steps(
    model: nn.Module, loss: Loss, dtype: torch.dtype, repeats: int
) -> dict[str, Measurement]:
    """Tokens a second: forward and backward alone, and with clipping and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    passes, steps = [], []
    for _ in range(repeats + 1):
        tokens = torch.randint(50277, (1, SEQLEN + 1))
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss(tokens)
        value.backward()
        passes.append(time.perf_counter() - start)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - start)
    return {
        "forward and backward": Measurement.of(passes[1:]).rate(SEQLEN),
        "whole step": Measurement.of(steps[1:]).rate(SEQLEN),
    }


def measure_on_cpu(repeats: int, peers: bool, json: Path | None) -> None:
    """Prints the table, with transformers' steps if `peers` are wanted, and writes it to `json`."""
    cases = [("mambakit", ours, torch.float32)]
    if (reason := slow_bfloat16()) is None:
        cases.append(("mambakit", ours, torch.bfloat16))
    else:
        print(f"bfloat16 is left out: {reason}")
    if peers:
        cases.append(("transformers", transformers, torch.float32))
    rows: list[dict[str, Any]] = []
    for name, make, dtype in cases:
        torch.manual_seed(0)
        times = 1 if make is transformers else repeats
        precision = str(dtype).removeprefix("torch.")
        for what, rate in measure_steps(*make(), dtype, times).items():
            rows.append({"model": name, "precision": precision, "what": what, **vars(rate)})
    print_table(
        "130M parameters, 1 x 512",
        ("", "precision", "", "tokens/s", "spread"),
        [
            (
                row["model"],
                row["precision"],
                row["what"],
                f"{row['median']:.1f}",
                f"±{row['spread']:.0%}",
            )
            for row in rows
        ],
    )
    if json:
        save(json, {"environment": environment(), "rows": rows})
