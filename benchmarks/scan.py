"""Speed of the selective scan on one GPU, beside attention, convolution and a loop over time.

    python benchmarks/scan.py                    # both parts; about two minutes
    python benchmarks/scan.py --only shapes      # Gelem/s at the sizes of models
    python benchmarks/scan.py --only lengths     # Figure 8 (left) of the paper
    python benchmarks/scan.py --json benchmarks/results/scan-gpu.json --plot docs/pictures/scan-gpu.png

bfloat16, N = 16, with D, z, dt_bias and softplus. No speed without parity: the error of the scan against float64 may be
at most twice that of the reference in bfloat16. Times are of the GPU (events), medians, with buffers in rotation that
do not fit in its L2 cache. The official kernels are measured too where the package mamba_ssm is installed.

Length by length: batch 1, 1024 channels. FlashAttention is PyTorch's, causal, 16 heads of 64; the convolution
multiplies the input's Fourier transform with a kernel's, which is given. What takes longer than `--slowest` is not
measured at greater lengths.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu import gpu_environment, rotation, size, time_calls
from mambakit.ops import selective_scan
from report import Measurement, print_table, save

D_STATE = 16
SHAPES = ((8, 5120, 2048), (8, 1536, 2048), (1, 1536, 65536), (1, 5120, 2048), (64, 1536, 512))
LENGTHS = tuple(2**power for power in range(9, 20))
CHANNELS, HEADS = 1024, 16
LEAVES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")

Tensors = dict[str, Tensor]
Case = tuple[Callable[..., Tensor], Tensors]
"""A function, and a set of its inputs; those that are to have a gradient require it."""


def scan_inputs(batch: int, channels: int, seqlen: int) -> Tensors:
    """The values that a model starts with: A = -(n + 1), dt between 0.001 and 0.1."""
    half = {"device": "cuda", "dtype": torch.bfloat16}
    sequence = (batch, seqlen, channels)
    n = torch.arange(1, D_STATE + 1, device="cuda", dtype=torch.float32)
    tensors = {
        "x": torch.randn(sequence, **half),
        "dt": torch.randn(sequence, **half) / 2,
        "A": -n.repeat(channels, 1),
        "B": torch.randn(batch, seqlen, D_STATE, **half),
        "C": torch.randn(batch, seqlen, D_STATE, **half),
        "D": torch.ones(channels, device="cuda"),
        "z": torch.randn(sequence, **half),
        "dt_bias": torch.rand(channels, device="cuda") * 4.6 - 6.9,
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def ours(**inputs: Tensor) -> Tensor:
    return selective_scan(**inputs, dt_softplus=True, backend="cuda")[0]


def loop(**inputs: Tensor) -> Tensor:
    return selective_scan(**inputs, dt_softplus=True, backend="reference")[0]


def official(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Tensor) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y: Tensor = selective_scan_fn(
        x, dt, A, B, C, rest["D"], z=rest["z"], delta_bias=rest["dt_bias"], delta_softplus=True
    )
    return y


def official_inputs(batch: int, channels: int, seqlen: int) -> Tensors:
    """The same in the layout that the official kernels are fast with, time last."""
    tensors = scan_inputs(batch, channels, seqlen)
    return {
        name: (tensor.detach().transpose(1, 2).contiguous() if tensor.ndim == 3 else tensor.detach())
        .requires_grad_()
        for name, tensor in tensors.items()
    }  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_inputs(batch: int, channels: int, seqlen: int) -> Tensors:
    shape = (batch, HEADS, seqlen, channels // HEADS)
    draw = partial(torch.randn, shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return {name: draw() for name in "qkv"}


def convolution(x: Tensor, spectrum: Tensor) -> Tensor:
    seqlen = x.shape[-1]
    product = torch.fft.rfft(x.float(), n=2 * seqlen) * spectrum
    return torch.fft.irfft(product, n=2 * seqlen)[..., :seqlen].to(x.dtype)


def convolution_inputs(batch: int, channels: int, seqlen: int) -> Tensors:
    x = torch.randn(batch, channels, seqlen, device="cuda", dtype=torch.bfloat16)
    kernel = torch.randn(channels, seqlen, device="cuda")
    return {"x": x.requires_grad_(), "spectrum": torch.fft.rfft(kernel, n=2 * seqlen)}


METHODS: dict[str, tuple[Callable[..., Tensor], Callable[[int, int, int], Tensors]]] = {
    "scan": (ours, scan_inputs),
    "FlashAttention": (attention, attention_inputs),
    "FFT convolution": (convolution, convolution_inputs),
    "PyTorch loop": (loop, scan_inputs),
}
if importlib.util.find_spec("mamba_ssm") is not None:
    METHODS["official scan"] = (official, official_inputs)


def worst_ratio(channels: int, seqlen: int = 1024) -> float:
    """Largest ratio, over y and all gradients, of our error to that of the reference in bfloat16."""
    inputs = scan_inputs(1, channels, seqlen)
    dy = torch.randn(1, seqlen, channels, device="cuda", dtype=torch.bfloat16)

    def results(function: Callable[..., Tensor], dtype: torch.dtype | None) -> Iterator[Tensor]:
        leaves = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in inputs.items()}
        y = function(**leaves)
        yield y.detach()
        yield from torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))

    def errors(function: Callable[..., Tensor]) -> list[float]:
        found = results(function, None)
        return [
            float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)
        ]

    exact = list(results(loop, torch.float64))
    return max(a / max(b, 2**-24) for a, b in zip(errors(ours), errors(loop), strict=True))


def require_parity(channels: int) -> float:
    ratio = worst_ratio(channels)
    if ratio > 2:
        raise SystemExit(f"{channels} channels: error {ratio:.2f}x the reference's; no speed")
    return ratio


def timed(method: str, shape: tuple[int, int, int]) -> Iterator[tuple[str, Measurement | None]]:
    """Seconds of the forward, of the forward that prepares a backward, and of the backward."""
    function, draw = METHODS[method]
    sets = [draw(*shape)]
    num_bytes = size(*sets[0].values())
    # The loop keeps a graph of thousands of nodes for every set.
    count = 1 if method == "PyTorch loop" else rotation(num_bytes)
    sets += [draw(*shape) for _ in range(count - 1)]
    with torch.no_grad():
        yield "forward", time_calls([partial(function, **inputs) for inputs in sets])
    yield "training forward", time_calls([partial(function, **inputs) for inputs in sets])
    calls = []
    for inputs in sets:
        y = function(**inputs)
        leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]
        calls.append(
            partial(torch.autograd.grad, y, leaves, torch.randn_like(y), retain_graph=True)
        )
    yield "backward", time_calls(calls)


def measure_shapes() -> list[dict[str, Any]]:
    """Gelem/s at the sizes of models: ours, and the official kernels' if they are there."""
    rows = []
    for method in [name for name in METHODS if name.endswith("scan")]:
        for shape in SHAPES:
            batch, channels, seqlen = shape
            ratio = require_parity(channels) if method == "scan" else None
            elements = batch * channels * seqlen
            passes = dict(timed(method, shape))
            rows.append({
                "method": method, "batch": batch, "channels": channels, "seqlen": seqlen, "error_ratio": ratio,
                **{name: {"ms": 1e3 * seconds.median, "spread": seconds.spread,
                          "gelem_per_s": elements / seconds.median / 1e9} for name, seconds in passes.items()},
            })  # fmt: skip
            torch.cuda.empty_cache()
    passes = ("forward", "training forward", "backward")
    print_table(
        "Gelem/s (batch x time x channel), bf16, N = 16",
        ["", "B", "D", "L", *passes, "error to reference's"],
        [
            [row["method"], *(str(row[k]) for k in ("batch", "channels", "seqlen")),
             *(f"{row[p]['gelem_per_s']:.1f} ±{row[p]['spread']:.0%}" for p in passes),
             f"{row['error_ratio']:.2f}x" if row["error_ratio"] else ""]
            for row in rows
        ],
    )  # fmt: skip
    return rows


def measure_lengths(lengths: tuple[int, ...], slowest: float) -> list[dict[str, Any]]:
    """Milliseconds of every method at every length until it is too slow or does not fit."""
    require_parity(CHANNELS)
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        for seqlen in lengths:
            row: dict[str, Any] = {"method": method, "seqlen": seqlen}
            rows.append(row)
            try:
                for name, seconds in timed(method, (1, CHANNELS, seqlen)):
                    row[name] = {"ms": 1e3 * seconds.median, "spread": seconds.spread}
                    if seconds.median > slowest:
                        break
            except torch.cuda.OutOfMemoryError:
                row["stopped"] = "out of memory"
            torch.cuda.empty_cache()
            if "backward" not in row or row["backward"]["ms"] > 1e3 * slowest:
                row.setdefault("stopped", f"takes more than {slowest:g} s")
                break
    for name in ("forward", "backward"):
        times = {(row["method"], row["seqlen"]): row.get(name) for row in rows}
        print_table(
            f"{name}, ms: batch 1, {CHANNELS} channels, bf16, N = {D_STATE}",
            ["L", *METHODS],
            [
                [str(seqlen), *(f"{found['ms']:.4g}" if (found := times.get((m, seqlen))) else "-" for m in METHODS)]
                for seqlen in lengths
            ],
        )  # fmt: skip
    return rows


def plot(rows: list[dict[str, Any]], gpu: str, path: Path) -> None:
    """Time over length, log-log, forward beside backward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("forward", "backward"), strict=True):
        for method, marker in zip(
            dict.fromkeys(row["method"] for row in rows), "os^Dv", strict=False
        ):
            points = [
                (r["seqlen"], r[name]["ms"]) for r in rows if r["method"] == method and name in r
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, markersize=5, label=method)
        axis.set(title=name, xlabel="length", xscale="log", yscale="log")
        ticks = sorted({row["seqlen"] for row in rows})[::2]
        axis.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend(frameon=False)
    figure.suptitle(f"batch 1, {CHANNELS} channels, N = {D_STATE}, bfloat16, one {gpu}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["shapes", "lengths"])
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--slowest", type=float, default=0.5, help="seconds")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="write the picture of the lengths here")
    parser.add_argument("--commit", help="name of the commit, where git cannot tell")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    results: dict[str, Any] = {"environment": gpu_environment(arguments.commit)}
    print("\n".join(f"{name}: {value}" for name, value in results["environment"].items()))
    if arguments.only != "lengths":
        results["shapes"] = measure_shapes()
    if arguments.only != "shapes":
        lengths = tuple(length for length in LENGTHS if length <= arguments.longest)
        results["lengths"] = measure_lengths(lengths, arguments.slowest)
        if arguments.plot:
            plot(results["lengths"], results["environment"]["gpu"], arguments.plot)
    if arguments.json:
        save(arguments.json, results)


if __name__ == "__main__":
    main()
