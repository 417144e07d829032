"""One call of every op, small, with every option present."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from mambakit import ops

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

BATCH, SEQLEN, CHANNELS, D_STATE, WIDTH, VOCAB = 2, 70, 98, 16, 4, 53


def scan_inputs(is_complex: bool = False) -> Inputs:
    A = -torch.rand(CHANNELS, D_STATE) * torch.arange(1, D_STATE + 1) - 0.01
    weight = torch.complex64 if is_complex else torch.float32
    return {
        "x": torch.randn(BATCH, SEQLEN, CHANNELS),
        "dt": torch.randn(BATCH, SEQLEN, CHANNELS) / 2 - 2,
        "A": torch.complex(A, 3 * torch.randn_like(A)) if is_complex else A,
        "B": torch.randn(BATCH, SEQLEN, D_STATE, dtype=weight),
        "C": torch.randn(BATCH, SEQLEN, 2, D_STATE, dtype=weight),
        "D": torch.randn(CHANNELS),
        "z": torch.randn(BATCH, SEQLEN, CHANNELS),
        "dt_bias": torch.randn(CHANNELS) / 10,
        "initial_state": torch.randn(BATCH, CHANNELS, D_STATE, dtype=weight),
        "seq_idx": (torch.rand(BATCH, SEQLEN) < 0.1).cumsum(1),
    }


def conv_inputs() -> Inputs:
    return {
        "x": torch.randn(BATCH, SEQLEN, CHANNELS),
        "weight": torch.randn(CHANNELS, WIDTH),
        "bias": torch.randn(CHANNELS),
        "initial_state": torch.randn(BATCH, CHANNELS, WIDTH - 1),
        "seq_idx": (torch.rand(BATCH, SEQLEN) < 0.1).cumsum(1),
    }


def norm_inputs(*names: str) -> Inputs:
    tensors = {name: torch.randn(BATCH, SEQLEN, CHANNELS) for name in names}
    return {**tensors, "weight": torch.randn(CHANNELS)}


def loss_inputs() -> Inputs:
    return {
        "hidden": torch.randn(BATCH, SEQLEN, CHANNELS),
        "weight": torch.randn(VOCAB, CHANNELS) / 10,
        "targets": torch.randint(0, VOCAB, (BATCH, SEQLEN)),
    }


OPS: dict[str, tuple[Callable[..., Tensor | Outputs], Callable[[], Inputs]]] = {
    "selective_scan": (partial(ops.selective_scan, dt_softplus=True), scan_inputs),
    "selective_scan, complex": (
        partial(ops.selective_scan, dt_softplus=True),
        partial(scan_inputs, is_complex=True),
    ),
    "causal_conv1d": (partial(ops.causal_conv1d, activation="silu"), conv_inputs),
    "rms_norm": (ops.rms_norm, partial(norm_inputs, "x")),
    "add_rms_norm": (ops.add_rms_norm, partial(norm_inputs, "x", "residual")),
    "linear_cross_entropy": (ops.linear_cross_entropy, loss_inputs),
}
"""Name: the op, and how to draw inputs for it."""


def scan_step(ssm_state: Tensor, **inputs: Tensor) -> Outputs:
    """A step from a copy of the state: y and the new state."""
    state = ssm_state.clone()
    return ops.selective_scan_step(state, **inputs, dt_softplus=True), state


def conv_step(conv_state: Tensor, **inputs: Tensor) -> Outputs:
    """A step from a copy of the state: y and the new state."""
    state = conv_state.clone()
    return ops.causal_conv1d_step(state, **inputs, activation="silu"), state


def step_inputs(whole: Callable[[], Inputs], state: str) -> Inputs:
    """The inputs of one step, out of those of a sequence."""
    inputs = whole()
    start = inputs.pop("initial_state")
    del inputs["seq_idx"]
    return {state: start, **{k: v[:, 0] if v.ndim >= 3 else v for k, v in inputs.items()}}


STEPS: dict[str, tuple[Callable[..., Outputs], Callable[[], Inputs]]] = {
    "selective_scan_step": (scan_step, partial(step_inputs, scan_inputs, "ssm_state")),
    "selective_scan_step, complex": (
        scan_step,
        partial(step_inputs, partial(scan_inputs, is_complex=True), "ssm_state"),
    ),
    "causal_conv1d_step": (conv_step, partial(step_inputs, conv_inputs, "conv_state")),
}
"""The same for the steps, which have no gradient."""


def on(device: torch.device | str, inputs: Inputs, has_gradient: bool = True) -> Inputs:
    """The inputs on the device, collecting gradients."""
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    for tensor in moved.values():
        tensor.requires_grad_(has_gradient and (tensor.is_floating_point() or tensor.is_complex()))
    return moved


def call(op: Callable[..., Tensor | Outputs], inputs: Inputs) -> list[Tensor]:
    """All outputs, and the gradients of all inputs that collect one."""
    outputs = op(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]
    if not leaves:
        return list(outputs)
    gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
    return [*(output.detach() for output in outputs), *gradients]


def captured(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of the function, which has run three times before, and its results after each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def skip_or_fail(reason: str) -> None:
    """Skip the test, or fail it where the GPU's tests are required."""
    if "gpu" in os.environ.get("MAMBAKIT_REQUIRE", "").split(","):
        pytest.fail(f"MAMBAKIT_REQUIRE=gpu, but {reason}")
    pytest.skip(reason)
