"""Speed of the ops around the scan on one GPU, against what it copies and multiplies.

    python benchmarks/gpu_ops.py             # half a minute
    python benchmarks/gpu_ops.py --json benchmarks/results/ops-gpu.json

One layer of the 130M model at 32 x 2,048 (D = 1536, M = 768, V = 50,280), activations in bfloat16. Convolution and norm
are bound by memory: their speed is that of the bytes that they must move, read or written once, as a part of the
device's copy bandwidth. The loss is bound by its three matrix products: what it takes longer than they take alone is
set against the bytes of the logits, read and written once. No speed without parity: on fewer rows, the error against
float64 may be at most twice that of the reference in the same dtypes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu import gpu_environment, rotation, size, time_calls
from mambakit import ops
from report import print_table, save

BATCH, SEQLEN, D_INNER, D_MODEL, VOCAB = 32, 2048, 1536, 768, 50280
Tensors = dict[str, Tensor]
Case = tuple[Callable[..., tuple[Tensor, ...]], Tensors]

half = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
full = partial(torch.randn, device="cuda")


def conv(batch: int, seqlen: int) -> Case:
    tensors = {
        "x": half(batch, seqlen, D_INNER), "weight": full(D_INNER, 4), "bias": full(D_INNER)
    }  # fmt: skip
    return partial(ops.causal_conv1d, activation="silu"), tensors


def norm(batch: int, seqlen: int) -> Case:
    shape = (batch, seqlen, D_MODEL)
    return ops.add_rms_norm, {"x": half(shape), "residual": full(shape), "weight": full(D_MODEL)}


def loss(batch: int, seqlen: int) -> Case:
    targets = torch.randint(0, VOCAB, (batch, seqlen), device="cuda")

    def run(hidden: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, ...]:
        return (ops.linear_cross_entropy(hidden, weight, targets, backend=backend),)

    return run, {"hidden": half(batch, seqlen, D_MODEL), "weight": 0.02 * full(VOCAB, D_MODEL)}


def results(case: Case, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs and all gradients."""
    op, tensors = case
    leaves = {k: v.to(dtype or v.dtype, copy=True).requires_grad_() for k, v in tensors.items()}
    outputs = op(**leaves, backend=backend)
    gradients = torch.autograd.grad(outputs[0].sum(), list(leaves.values()))
    return [tensor.detach() for tensor in (outputs[0], *gradients)]


def require_parity(name: str, case: Case) -> float:
    """The largest ratio of our error to the reference's own."""
    exact = results(case, "reference", torch.float64)

    def errors(backend: str) -> list[float]:
        found = results(case, backend)
        return [
            float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)
        ]

    pairs = zip(errors("cuda"), errors("reference"), strict=True)
    ratio = max(ours / max(theirs, 2**-23) for ours, theirs in pairs)
    if ratio > 2:
        raise SystemExit(f"{name}: error {ratio:.2f}x the reference's; no speed")
    return ratio


def passes(make: Callable[[int, int], Case]) -> dict[str, float]:
    """Seconds of forward and backward, and of both."""
    op, first = make(BATCH, SEQLEN)
    sets = [first] + [make(BATCH, SEQLEN)[1] for _ in range(rotation(size(*first.values())) - 1)]
    forwards, backwards = [], []
    for tensors in sets:
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        outputs = [o for o in op(**leaves, backend="cuda") if o.requires_grad]
        gradients = [torch.randn_like(output) for output in outputs]
        inputs = list(leaves.values())
        forwards.append(partial(op, **leaves, backend="cuda"))
        backwards.append(
            partial(torch.autograd.grad, outputs, inputs, gradients, retain_graph=True)
        )
    return {
        "forward": time_calls(forwards).median,
        "backward": time_calls(backwards).median,
    }


def products() -> float:
    """Seconds of the three products of the loss alone, with the logits in blocks of 1 GiB."""
    rows = 2**30 // (2 * VOCAB) // 256 * 256
    hidden, weight, logits = half(rows, D_MODEL), half(VOCAB, D_MODEL), half(rows, VOCAB)

    def run() -> None:
        torch.matmul(hidden, weight.t(), out=logits)
        logits @ weight
        logits.t() @ hidden

    return time_calls([run]).median * BATCH * SEQLEN / rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--commit", help="name of the commit, where git cannot tell")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    known = gpu_environment(arguments.commit)
    print("\n".join(f"{name}: {value}" for name, value in known.items()))

    channels, width = BATCH * SEQLEN * D_INNER, BATCH * SEQLEN * D_MODEL
    # (x, y) and (x, dy, dx) in bfloat16; x and y in bfloat16 with two sums in float32, and
    # dy, dx in bfloat16 with the sum and two of its gradients in float32.
    moved = {
        "causal_conv1d": {"forward": 4 * channels, "backward": 6 * channels},
        "add_rms_norm": {"forward": 12 * width, "backward": 16 * width},
    }
    rows: list[dict[str, Any]] = []
    for name, make in {"causal_conv1d": conv, "add_rms_norm": norm}.items():
        ratio = require_parity(name, make(2, 300))
        for phase, seconds in passes(make).items():
            speed = moved[name][phase] / seconds / 1e9
            rows.append({
                "op": name, "pass": phase, "ms": 1e3 * seconds, "gb_per_s": speed,
                "of_copy": speed / known["copy_gb_per_s"], "error_ratio": ratio,
            })  # fmt: skip
    ratio = require_parity("linear_cross_entropy", loss(2, 300))
    seconds, alone = sum(passes(loss).values()), products()
    speed = 4 * BATCH * SEQLEN * VOCAB / max(seconds - alone, 1e-9) / 1e9
    rows.append({
        "op": "linear_cross_entropy", "pass": "both", "ms": 1e3 * seconds, "products_ms": 1e3 * alone,
        "gb_per_s": speed, "of_copy": speed / known["copy_gb_per_s"], "error_ratio": ratio,
    })  # fmt: skip
    print_table(
        f"batch {BATCH}, length {SEQLEN}",
        ["", "pass", "ms", "GB/s", "of copy", "error to reference's"],
        [
            [r["op"], r["pass"], f"{r['ms']:.3f}", f"{r['gb_per_s']:,.0f}", f"{r['of_copy']:.0%}",
             f"{r['error_ratio']:.2f}x"]
            for r in rows
        ],
    )  # fmt: skip
    print(f"the three products of the loss alone: {1e3 * alone:.3f} ms")
    if arguments.json:
        save(arguments.json, {"environment": known, "rows": rows})


if __name__ == "__main__":
    main()
