"""The rule of every fast backend: at most twice the error that the reference makes in the same dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor | None]
Op = Callable[..., Tensor | tuple[Tensor, ...]]


def device_of(backend: str) -> torch.device:
    """Where a backend runs. The reference could anywhere; on a GPU its loop over time is slow."""
    return torch.device("cuda" if backend == "cuda" else "cpu")


def on_device_of(backend: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs where the backend runs."""
    device = device_of(backend)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def run(
    op: Op, inputs: Tensors, backend: str, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Outputs of the op and gradients of all inputs, for fixed random gradients of the outputs.

    The inputs are on the CPU, and so are the results, wherever the backend runs: on its device, or on `device`.
    Integers have no gradient.
    """
    device = device or device_of(backend)
    inputs = {k: None if v is None else v.detach().to(device, copy=True) for k, v in inputs.items()}
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if is_differentiable(v)}
    outputs = op(**inputs, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for output in outputs:
        real = torch.view_as_real(output) if output.is_complex() else output
        weights = torch.randn(real.shape, generator=generator, dtype=torch.float64)
        loss = loss + (real * weights.to(real)).sum()
    loss.backward()
    found = {f"output {i}": o.detach().cpu() for i, o in enumerate(outputs)}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"no gradient for {name}"
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.shape == leaf.shape
        found[f"gradient of {name}"] = leaf.grad.cpu()
    return found


def assert_accurate(op: Op, inputs: Tensors | Sequence[Tensors], backend: str) -> None:
    """Compare backend and reference, both run on `inputs` on one device, with the reference in float64.

    The error of a handful of numbers is chance, so where there are few, several draws of the inputs are
    given, and compared as one tensor. One rounding in float32, in which all backends compute, is granted on top: on a
    handful of numbers the reference may happen to be exact.
    """
    draws = [inputs] if isinstance(inputs, dict) else inputs
    ours, theirs, truths = defaultdict(list), defaultdict(list), defaultdict(list)
    for draw in draws:
        exact = run(
            op, {k: widen(v) if is_differentiable(v) else v for k, v in draw.items()}, "reference"
        )
        found = run(op, draw, backend)
        reference = run(op, draw, "reference", device_of(backend))
        for name, truth in exact.items():
            assert found[name].dtype == reference[name].dtype, name
            assert torch.isfinite(torch.view_as_real(truth) if truth.is_complex() else truth).all()
            ours[name].append(found[name].flatten())
            theirs[name].append(reference[name].flatten())
            truths[name].append(truth.flatten())
    for name in ours:
        truth = torch.cat(truths[name])
        got = error(torch.cat(ours[name]), truth)
        allowed = 2 * error(torch.cat(theirs[name]), truth) + torch.finfo(torch.float32).eps / 2
        assert got <= allowed, f"{name}: error {got:.2e}, allowed {allowed:.2e}"


def is_differentiable(tensor: Tensor | None) -> bool:
    """Whether it holds real or complex numbers, not integers."""
    return tensor is not None and (tensor.is_floating_point() or tensor.is_complex())


def widen(tensor: Tensor) -> Tensor:
    """The same numbers in float64 or complex128."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def error(found: Tensor, truth: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    norm = truth.norm()
    if norm == 0:
        return float(widen(found).norm())
    return float((widen(found) - truth).norm() / norm)
