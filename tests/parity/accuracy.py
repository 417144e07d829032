"""The rule of every fast backend: at most twice the error that the reference makes in the same dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor | None]
Op = Callable[..., Tensor | tuple[Tensor, ...]]


def run(op: Op, inputs: Tensors, backend: str) -> dict[str, Tensor]:
    """Outputs of the op and gradients of all inputs, for fixed random gradients of the outputs."""
    leaves = {k: None if v is None else v.clone().requires_grad_() for k, v in inputs.items()}
    outputs = op(**leaves, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        real = torch.view_as_real(output) if output.is_complex() else output
        weights = torch.randn(real.shape, generator=generator, dtype=torch.float64)
        loss = loss + (real * weights.to(real.dtype)).sum()
    loss.backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for name, leaf in leaves.items():
        if leaf is not None:
            assert leaf.grad is not None, f"no gradient for {name}"
            assert leaf.grad.dtype == leaf.dtype
            assert leaf.grad.shape == leaf.shape
            found[f"gradient of {name}"] = leaf.grad
    return found


def assert_accurate(op: Op, inputs: Tensors, backend: str) -> None:
    """Compare backend and reference, both run on `inputs`, with the reference in float64.

    One rounding in float32, in which all backends compute, is granted on top: on a handful of numbers the reference may
    happen to be exact.
    """
    exact_inputs = {k: None if v is None else widen(v) for k, v in inputs.items()}
    exact = run(op, exact_inputs, "reference")
    ours, theirs = run(op, inputs, backend), run(op, inputs, "reference")
    for name, truth in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.isfinite(torch.view_as_real(truth) if truth.is_complex() else truth).all()
        allowed = 2 * error(theirs[name], truth) + torch.finfo(torch.float32).eps / 2
        got = error(ours[name], truth)
        assert got <= allowed, f"{name}: error {got:.2e}, allowed {allowed:.2e}"


def widen(tensor: Tensor) -> Tensor:
    """The same numbers in float64 or complex128."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def error(found: Tensor, truth: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    norm = truth.norm()
    if norm == 0:
        return float(widen(found).norm())
    return float((widen(found) - truth).norm() / norm)
