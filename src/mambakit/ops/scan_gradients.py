"""What PyTorch is told of the scan's operators, the same for every backend: fake shapes, and the way of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambakit.ops.gradient_room import room_for
from mambakit.ops.operators import Operator

Z = 6
"""Place of z among the arguments of the operators."""


def operators(
    device: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    saved_like: Callable[[Tensor, Tensor, bool], Tensor],
) -> tuple[Operator, Operator]:
    """Make operators of the two functions of a backend, the second the gradient of the first.

    Args:
        device: "cpu" or "cuda".
        forward: Takes x, dt, A, B, C, D, z, dt_bias, initial_state, restart, dt_softplus and save; returns y, the
            final state and what the backward needs (of no steps unless `save`).
        backward: Takes the gradients of y and of the final state, x to dt_bias, restart, what was saved, and
            dt_softplus, on a GPU also memory for the gradient of z, or None; returns the gradients of x to dt_bias and
            of the initial state, of no elements for what is absent.
        saved_like: An empty tensor like the third output of `forward`, from x, A and save.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, initial_state, restart, dt_softplus, _ = inputs
        ctx.save_for_backward(*tensors, restart, output[2])
        ctx.dt_softplus, ctx.has_initial_state = dt_softplus, initial_state is not None
        ctx.set_materialize_grads(False)  # Not for what is saved: as large as x, and without one.

    def gradients(ctx: Any, dy: Tensor | None, dstate: Tensor | None, _: None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # Once: activation checkpointing gives them out only once.
        x, A = saved[0], saved[2]
        dy = torch.zeros_like(x) if dy is None else dy
        dstate = (
            x.new_zeros(x.shape[0], *A.shape, dtype=_state_dtype(A)) if dstate is None else dstate
        )
        room = (room_for(ctx, saved, Z),) if device == "cuda" else ()
        *found, dinitial = run_backward(dy, dstate, *saved, ctx.dt_softplus, *room)
        present = [None if t is None else g for t, g in zip(saved[:8], found, strict=True)]
        return (*present, dinitial if ctx.has_initial_state else None, None, None, None)

    def fake_forward(x, dt, A, B, C, D, z, dt_bias, initial_state, restart, dt_softplus, save):  # type: ignore[no-untyped-def]
        state = x.new_empty(x.shape[0], *A.shape, dtype=_state_dtype(A))
        return x.new_empty(x.shape), state, saved_like(x, A, save)

    def fake_backward(dy, dstate, x, dt, A, B, C, D, z, dt_bias, *_):  # type: ignore[no-untyped-def]
        nothing = x.new_empty(0, dtype=torch.float32)
        tensors = (x, dt, A, B, C, D, z, dt_bias, dstate)
        return tuple(
            torch.empty_like(nothing) if t is None else t.new_empty(t.shape) for t in tensors
        )

    name = f"{device}_selective_scan"
    run_backward = Operator(f"{name}_backward", device, backward, fake=fake_backward)
    run_forward = Operator(
        name, device, forward, fake=fake_forward, setup=setup, gradients=gradients
    )
    return run_forward, run_backward


def _state_dtype(A: Tensor) -> torch.dtype:
    return torch.complex64 if A.is_complex() else torch.float32
