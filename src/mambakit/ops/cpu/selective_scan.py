"""The selective scan on the CPU: PyTorch operators around the kernels of `kernels.selective_scan`."""

from __future__ import annotations

import math
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from mambakit.ops.cpu.arrays import array, readable, rows, vector
from mambakit.ops.cpu.blocks import LANES, cut_channels, from_blocks, to_blocks
from mambakit.ops.cpu.threads import run
from mambakit.ops.operators import Operator
from mambakit.ops.scan_gradients import operators
from mambakit.ops.scan_inputs import of_one_kind, restarts

TILE = 16


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as in `mambakit.ops.selective_scan`."""
    A, B, C, initial_state = of_one_kind(A, B, C, initial_state)
    restart = restarts(seq_idx)
    groups = math.lcm(*(W.shape[2] for W in (B, C) if W.ndim == 4))
    width = x.shape[2] // groups

    def scan(group: int) -> tuple[Tensor, Tensor]:
        channels = slice(group * width, (group + 1) * width)

        def weight(W: Tensor) -> Tensor:
            if W.ndim == 2:
                return W[channels]
            return W if W.ndim == 3 else W[:, :, group * W.shape[2] // groups]

        tensors = (
            x[..., channels],
            dt[..., channels],
            A[channels],
            weight(B),
            weight(C),
            None if D is None else D[channels],
            None if z is None else z[..., channels],
            None if dt_bias is None else dt_bias[channels],
            None if initial_state is None else initial_state[:, channels],
        )
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        y, state, _ = _forward(*tensors, restart, dt_softplus, save)
        return y, state

    if groups == 1:
        return scan(0)
    ys, states = zip(*map(scan, range(groups)), strict=True)
    return torch.cat(ys, dim=2), torch.cat(states, dim=1)


def _run_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    dt_bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    restart: Optional[Tensor],
    dt_softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the state before each tile in blocks (no numbers unless `save`)."""
    from mambakit.ops.cpu.kernels.selective_scan import forward

    batch, seqlen, d_inner = x.shape
    cut = cut_channels(batch, d_inner)
    start = A.new_zeros(batch, *A.shape) if initial_state is None else initial_state
    state = to_blocks(start, *cut)
    saved = _saved_like(x, A, save)
    y = torch.empty_like(readable(x), memory_format=torch.contiguous_format)
    run(
        forward, batch * cut[0], seqlen, d_inner, *_inputs(x, dt, A, B, C, D, z, dt_bias, cut), dt_softplus,
        array(restart), array(state), rows(y), array(saved) if save else None,
    )  # fmt: skip
    return y.to(x.dtype), from_blocks(state, A), saved


def _run_backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    dt_bias: Optional[Tensor],
    restart: Optional[Tensor],
    saved: Tensor,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state (of no elements for absent inputs)."""
    from mambakit.ops.cpu.kernels.selective_scan import backward

    batch, seqlen, d_inner = x.shape
    cut = cut_channels(batch, d_inner)
    adjoint = to_blocks(dstate, *cut)
    dA = torch.zeros_like(adjoint)
    dB, dC = (
        torch.zeros_like(adjoint) if W.ndim == 2 else dstate.new_empty(cut[0], *W.shape)
        for W in (B, C)
    )
    dD, dbias = torch.zeros(2, batch, d_inner, dtype=torch.float64)
    dx, ddt, dz = (
        adjoint.new_empty(0)
        if t is None
        else torch.empty_like(readable(t), memory_format=torch.contiguous_format)
        for t in (x, dt, z)
    )
    run(
        backward, batch * cut[0], seqlen, d_inner, *_inputs(x, dt, A, B, C, D, z, dt_bias, cut), dt_softplus,
        array(restart), array(saved), rows(readable(dy)), array(adjoint), rows(dx), rows(ddt), array(dA),
        array(dB).view(np.float32), array(dC).view(np.float32), array(dD), rows(dz) if z is not None else None,
        array(dbias),
    )  # fmt: skip

    def like(gradient: Tensor, parameter: Tensor | None) -> Tensor:
        return adjoint.new_empty(0) if parameter is None else gradient.to(parameter.dtype)

    return (
        like(dx, x),
        like(ddt, dt),
        like(from_blocks(dA.sum(0), A), A),
        like(dB.sum(0) if B.ndim == 3 else from_blocks(dB.sum(0), A), B),
        like(dC.sum(0) if C.ndim == 3 else from_blocks(dC.sum(0), A), C),
        like(dD.sum(0), D),
        like(dz, z),
        like(dbias.sum(0), dt_bias),
        from_blocks(adjoint, A),
    )


def _saved_like(x: Tensor, A: Tensor, save: bool) -> Tensor:
    if not save:
        return x.new_empty(0, dtype=torch.float32)
    batch, seqlen, d_inner = x.shape
    tiles = -(-seqlen // TILE)
    numbers = (A.shape[1], 2) if A.is_complex() else (A.shape[1],)
    shape = (batch, tiles, *cut_channels(batch, d_inner), *numbers, LANES)
    return x.new_empty(shape, dtype=torch.float32)


_forward, _backward = operators("cpu", _run_forward, _run_backward, _saved_like)


def _inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cut: tuple[int, int],
) -> tuple[Any, ...]:
    """What both kernels read, in their form: A in blocks, and B and C if constant in time."""
    B, C = (array(to_blocks(W, *cut)) if W.ndim == 2 else vector(W) for W in (B, C))
    A = to_blocks(A, *cut)
    none = x.new_zeros(x.shape[2])
    return (
        rows(readable(x)), rows(readable(dt)), array(A), B, C, vector(none if D is None else D),
        None if z is None else rows(readable(z)), vector(none if dt_bias is None else dt_bias),
    )  # fmt: skip


def selective_scan_step(
    ssm_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """Arguments as in `mambakit.ops.selective_scan_step`."""
    A, B, C, _ = of_one_kind(A, B, C, None)
    y: Tensor = _step(ssm_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return y


def _run_step(
    ssm_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    dt_bias: Optional[Tensor],
    dt_softplus: bool,
) -> Tensor:
    from mambakit.ops.cpu.kernels.selective_scan_step import step

    batch = x.shape[0]
    y = torch.empty_like(readable(x), memory_format=torch.contiguous_format)
    B, C = (W.reshape(W.shape[0], -1, W.shape[-1]) for W in (B, C))
    run(
        step, batch, array(ssm_state), array(readable(x)), array(readable(dt)), vector(A), vector(B), vector(C),
        vector(D), None if z is None else array(readable(z)), vector(dt_bias), dt_softplus, array(y),
    )  # fmt: skip
    return y.to(x.dtype)


def _fake_step(ssm_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_step = Operator(
    "cpu_selective_scan_step", "cpu", _run_step, fake=_fake_step, mutates=["ssm_state"]
)
