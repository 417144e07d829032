"""Speed of the ops around the scan on one GPU, against what it copies and multiplies.

    python benchmarks/gpu_ops.py             # half a minute
    python benchmarks/gpu_ops.py --json benchmarks/results/ops-gpu.json

One layer of the 130M model at 32 x 2,048 (D = 1536, M = 768, V = 50,280), activations in bfloat16; the convolution also
at the shape of 1.4B, 4 x 2,048 (D = 4096). Convolution and norm are bound by memory: their speed is that of the bytes
that they must move, read or written once, as a part of the device's copy bandwidth. So is the kernel between the
matrix products of the loss, which overwrites logits with their gradient. All that the loss does but its three products
(casts, sums, scaling by the gradient of the loss; timed with the products left out) is set against the same bytes, the
logits read and their gradient written once. The products themselves slow down as the GPU gets warm, so a difference of
two long times says little. No speed without parity: on fewer rows, the error against float64 may be at most twice that
of the reference in the same dtypes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gpu import gpu_environment, rotation, size, time_calls
from mambakit import ops
from mambakit.ops.cuda import cross_entropy
from report import print_table, save

BATCH, SEQLEN, D_INNER, D_MODEL, VOCAB = 32, 2048, 1536, 768, 50280
Tensors = dict[str, Tensor]
Case = tuple[Callable[..., tuple[Tensor, ...]], Tensors]

half = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
full = partial(torch.randn, device="cuda")


def conv(batch: int, seqlen: int, channels: int) -> Case:
    tensors = {
        "x": half(batch, seqlen, channels), "weight": full(channels, 4), "bias": full(channels)
    }  # fmt: skip
    return partial(ops.causal_conv1d, activation="silu"), tensors


def norm(batch: int, seqlen: int, width: int) -> Case:
    shape = (batch, seqlen, width)
    return ops.add_rms_norm, {"x": half(shape), "residual": full(shape), "weight": full(width)}


def loss(batch: int, seqlen: int) -> Case:
    targets = torch.randint(0, VOCAB, (batch, seqlen), device="cuda")

    def run(hidden: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, ...]:
        return (ops.linear_cross_entropy(hidden, weight, targets, backend=backend),)

    return run, {"hidden": half(batch, seqlen, D_MODEL), "weight": 0.02 * full(VOCAB, D_MODEL)}


MEMORY_BOUND = (
    ("causal_conv1d", conv, (BATCH, SEQLEN, D_INNER), {"forward": 4, "backward": 6}),
    ("causal_conv1d", conv, (4, 2048, 4096), {"forward": 4, "backward": 6}),
    ("add_rms_norm", norm, (BATCH, SEQLEN, D_MODEL), {"forward": 12, "backward": 16}),
)
"""An op, its inputs, (batch, length, channels), and the bytes of an element: (x, y) and (x, dy, dx) in bfloat16; x and
y in bfloat16 with two sums in float32, and dy and dx in bfloat16 with the sum and two of its gradients in float32."""


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


def passes(make: Callable[[], Case]) -> dict[str, float]:
    """Seconds of forward and backward."""
    op, first = make()
    sets = [first] + [make()[1] for _ in range(rotation(size(*first.values())) - 1)]
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


def softmax() -> float:
    """Seconds of the kernel between the products of the loss, for the logits of all rows."""
    rows = cross_entropy.rows_of_block(BATCH * SEQLEN, 2 * VOCAB)
    logits, losses = half(rows, VOCAB), full(rows)
    targets = torch.randint(0, VOCAB, (rows,), device="cuda")
    alone = time_calls([partial(cross_entropy.softmax_, logits, targets, losses, -100, True)])
    return alone.median * BATCH * SEQLEN / rows


def whole_and_rest() -> tuple[float, float]:
    """Seconds of the loss with its gradients, and of the same without its three products."""
    op, tensors = loss(BATCH, SEQLEN)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def call() -> None:
        torch.autograd.grad(op(*leaves, backend="cuda"), leaves)

    def leave_out(left: Tensor, right: Tensor, out: Tensor) -> None:
        pass

    whole = time_calls([call]).median
    with patch.multiple(cross_entropy, multiply=leave_out, multiply_add=leave_out):
        return whole, time_calls([call]).median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--commit", help="name of the commit, where git cannot tell")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    known = gpu_environment(arguments.commit)
    print("\n".join(f"{name}: {value}" for name, value in known.items()))

    rows: list[dict[str, Any]] = []

    def add(
        op: str, shape: tuple[int, ...], phase: str, ms: float, moved: int, **more: float
    ) -> None:
        speed = moved / ms / 1e6
        part = speed / known["copy_gb_per_s"]
        measured = {"ms": ms, "gb_per_s": speed, "of_copy": part}
        rows.append({"op": op, "shape": shape, "pass": phase, **measured, **more})

    for op, make, shape, moved in MEMORY_BOUND:
        ratio = require_parity(op, make(2, 300, shape[2]))
        for phase, seconds in passes(partial(make, *shape)).items():
            add(op, shape, phase, 1e3 * seconds, moved[phase] * prod(shape), error_ratio=ratio)
    ratio = require_parity("linear_cross_entropy", loss(2, 300))
    shape, moved = (BATCH, SEQLEN, VOCAB), 4 * BATCH * SEQLEN * VOCAB
    add("linear_cross_entropy: softmax", shape, "both", 1e3 * softmax(), moved, error_ratio=ratio)
    whole, rest = whole_and_rest()
    add(
        "linear_cross_entropy: all but products", shape, "both", 1e3 * rest, moved,
        error_ratio=ratio, whole_ms=1e3 * whole,
    )  # fmt: skip
    print_table(
        "against the device's copy",
        ["", "batch, length, channels", "pass", "ms", "GB/s", "of copy", "error to reference's"],
        [
            [r["op"], str(r["shape"]), r["pass"], f"{r['ms']:.3f}", f"{r['gb_per_s']:,.0f}", f"{r['of_copy']:.0%}",
             f"{r['error_ratio']:.2f}x"]
            for r in rows
        ],
    )  # fmt: skip
    rate = 6 * prod(shape) * D_MODEL / (whole - rest) / 1e12
    print(f"linear_cross_entropy: {1e3 * whole:.3f} ms, its products at {rate:.0f} TFLOP/s")
    if arguments.json:
        save(arguments.json, {"environment": known, "rows": rows})


if __name__ == "__main__":
    main()
