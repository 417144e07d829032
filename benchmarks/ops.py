"""Speed and accuracy of the CPU kernels beside the reference.

    python benchmarks/ops.py                 # the table; refuses a speed whose result is wrong
    python benchmarks/ops.py --json benchmarks/results/ops-cpu.json

Every op runs at the size of one layer of the 130M model (B=1, L=2048, D=1536, N=16, M=768), float32.
Errors are relative to the float64 reference on a shorter sequence.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mambakit import ops
from report import Measurement, environment, forward_and_backward, save

BATCH, D_INNER, D_STATE, D_MODEL, VOCAB = 1, 1536, 16, 768, 50280
BACKENDS = ("reference", "cpu")
Case = tuple[Callable[..., tuple[Tensor, ...]], dict[str, Tensor]]


def scan(seqlen: int, kind: torch.dtype = torch.float64) -> Case:
    """With the initial A of the paper, complex if `kind` is: -(n + 1), or -1/2 + n i (S4D-Lin)."""
    normal = partial(torch.randn, dtype=torch.float64)
    n = torch.arange(D_STATE, dtype=torch.float64).repeat(D_INNER, 1)
    A = torch.complex(torch.full_like(n, -0.5), n) if kind.is_complex else -(n + 1)
    sequence, states = (BATCH, seqlen, D_INNER), (BATCH, seqlen, D_STATE)
    weight = partial(torch.randn, states, dtype=kind)
    tensors = {
        "x": normal(sequence), "dt": normal(sequence), "A": A, "B": weight(), "C": weight(),
        "D": normal(D_INNER), "z": normal(sequence), "dt_bias": normal(D_INNER) - 4,
    }  # fmt: skip
    return partial(ops.selective_scan, dt_softplus=True), tensors


def conv(seqlen: int) -> Case:
    normal = partial(torch.randn, dtype=torch.float64)
    tensors = {
        "x": normal(BATCH, seqlen, D_INNER), "weight": normal(D_INNER, 4), "bias": normal(D_INNER)
    }  # fmt: skip
    return partial(ops.causal_conv1d, activation="silu"), tensors


def norm(seqlen: int) -> Case:
    normal = partial(torch.randn, dtype=torch.float64)
    shape = (BATCH, seqlen, D_MODEL)
    return ops.add_rms_norm, {
        "x": normal(shape), "residual": normal(shape), "weight": normal(D_MODEL)
    }  # fmt: skip


def loss(seqlen: int) -> Case:
    normal = partial(torch.randn, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (BATCH, seqlen))

    def run(hidden: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, ...]:
        return (ops.linear_cross_entropy(hidden, weight, targets, backend=backend),)

    return run, {"hidden": normal(BATCH, seqlen, D_MODEL), "weight": 0.02 * normal(VOCAB, D_MODEL)}


CASES: dict[str, tuple[Callable[[int], Case], int, int]] = {
    # name: (how to make it, length timed, elements counted per time step)
    "selective_scan": (scan, 2048, D_INNER),
    "selective_scan (complex)": (partial(scan, kind=torch.complex128), 2048, D_INNER),
    "causal_conv1d": (conv, 2048, D_INNER),
    "add_rms_norm": (norm, 2048, D_MODEL),
    "linear_cross_entropy": (loss, 512, D_MODEL),
}


def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that collects a gradient, in the dtype or in its complex counterpart."""
    wanted = dtype.to_complex() if tensor.is_complex() else dtype
    return tensor.to(wanted, copy=True).requires_grad_()


def results(case: Case, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and all gradients."""
    op, tensors = case
    inputs = {k: leaf(v, dtype) for k, v in tensors.items()}
    outputs = op(**inputs, backend=backend)
    outputs[0].backward(torch.ones_like(outputs[0]))
    return [
        *(o.detach() for o in outputs),
        *(i.grad for i in inputs.values() if i.grad is not None),
    ]


def worst_error(case: Case, backend: str) -> tuple[float, float]:
    """The largest relative error (norm) over outputs and gradients, and the largest ratio to the reference's own."""
    exact = results(case, "reference", torch.float64)

    def errors(backend: str) -> list[float]:
        found = results(case, backend, torch.float32)
        return [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]

    ours, theirs = errors(backend), errors("reference")
    return max(ours), max(a / max(b, 2**-24) for a, b in zip(ours, theirs, strict=True))


def timed(name: str, repeats: int) -> dict[str, dict[str, Measurement]]:
    """Seconds of forward and of backward for each backend."""
    make, seqlen, _ = CASES[name]
    op, tensors = make(seqlen)
    inputs = {k: leaf(v, torch.float32) for k, v in tensors.items()}
    seconds = {}
    for backend in BACKENDS:
        count = 2 if backend == "reference" and name.startswith("selective_scan") else repeats
        forward, backward = forward_and_backward(op, inputs, backend, count)
        seconds[backend] = {"forward": forward, "backward": backward}
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=CASES, action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    table = Table(
        "op", "pass", *(f"{b}\nMelem/s" for b in BACKENDS), "ratio", "error", "to reference's"
    )
    rows = []
    for name in arguments.only or CASES:
        make, seqlen, elements = CASES[name]
        error, ratio = worst_error(make(130), "cpu")
        if ratio > 2:
            raise SystemExit(f"{name}: error {error:.1e} is {ratio:.2f}x the reference's; no speed")
        seconds = timed(name, arguments.repeats)
        for phase in ("forward", "backward"):
            rate = {b: seconds[b][phase].rate(BATCH * seqlen * elements / 1e6) for b in BACKENDS}
            rows.append({
                "op": name, "pass": phase, "seqlen": seqlen, "error": error, "error_ratio": ratio,
                **{f"{b}_melem_per_s": vars(r) for b, r in rate.items()},
            })  # fmt: skip
            speeds = [f"{r.median:.1f} ±{r.spread:.0%}" for r in rate.values()]
            speedup = rate["cpu"].median / rate["reference"].median
            table.add_row(name, phase, *speeds, f"{speedup:.1f}x", f"{error:.1e}", f"{ratio:.2f}x")
    Console().print(table)
    if arguments.json:
        save(arguments.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
