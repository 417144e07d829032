"""The causal depthwise convolution on the CPU: PyTorch operators around `kernels.causal_conv1d`."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from mambakit.ops import conv_state
from mambakit.ops.cpu.arrays import array, readable, rows, vector
from mambakit.ops.cpu.threads import run
from mambakit.ops.operators import Operator


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as in `mambakit.ops.causal_conv1d`."""
    past = conv_state.initial(x, weight.shape[1], initial_state)
    age = None if seq_idx is None else conv_state.age(seq_idx)
    y = _forward(x, weight, bias, past, age, activation == "silu")
    return y, conv_state.final(x, past, seq_idx)


def _run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    past: Tensor,
    age: Optional[Tensor],
    silu: bool,
) -> Tensor:
    from mambakit.ops.cpu.kernels.causal_conv1d import forward

    y = torch.empty_like(readable(x), memory_format=torch.contiguous_format)
    inputs = _inputs(x, weight, bias, past, age)
    run(forward, _tasks(x), *x.shape[1:], *inputs, silu, rows(y))
    return y.to(x.dtype)


def _fake_forward(x, weight, bias, past, age, silu):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _run_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    past: Tensor,
    age: Optional[Tensor],
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (in float32, of no bias too) and past."""
    from mambakit.ops.cpu.kernels.causal_conv1d import backward

    batch, seqlen, channels = x.shape
    dx = torch.empty_like(readable(x), memory_format=torch.contiguous_format)
    dweight = torch.zeros(batch, weight.shape[1], channels, dtype=torch.float64)
    dbias = torch.zeros(batch, channels, dtype=torch.float64)
    dpast = torch.zeros(past.shape)
    run(
        backward, _tasks(x), seqlen, channels, *_inputs(x, weight, bias, past, age), silu,
        rows(readable(dy)), rows(dx), array(dweight), array(dbias), array(dpast),
    )  # fmt: skip
    dweight = dweight.sum(0).t().contiguous().to(weight.dtype)
    return dx.to(x.dtype), dweight, dbias.sum(0).float(), dpast.to(past.dtype)


def _fake_backward(dy, x, weight, bias, past, age, silu):
    dbias = x.new_empty(x.shape[2], dtype=torch.float32)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, past.new_empty(past.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # Once: activation checkpointing gives them out only once.
    bias = saved[2]
    dx, dweight, dbias, dpast = _backward(dy, *saved, ctx.silu)
    return dx, dweight, None if bias is None else dbias.to(bias.dtype), dpast, None, None


_forward = Operator(
    "cpu_causal_conv1d", "cpu", _run_forward,
    fake=_fake_forward, setup=_setup, gradients=_gradients,
)  # fmt: skip
_backward = Operator("cpu_causal_conv1d_backward", "cpu", _run_backward, fake=_fake_backward)


def _tasks(x: Tensor) -> int:
    from mambakit.ops.cpu.kernels.causal_conv1d import GROUP

    return x.shape[0] * -(-x.shape[2] // GROUP)


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, age: Tensor | None
) -> tuple[Any, ...]:
    return (
        rows(readable(x)), vector(weight.t()), vector(bias), vector(past), array(age),
    )  # fmt: skip


def _run_step(
    conv_state: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool
) -> Tensor:
    from mambakit.ops.cpu.kernels.causal_conv1d import step

    wide = conv_state.dtype == torch.float16  # the kernel knows float32 and the bits of bfloat16
    state = conv_state.float() if wide else conv_state
    x_in = x.float() if wide else x
    y = torch.empty_like(x_in, memory_format=torch.contiguous_format)
    step(array(state), array(x_in), vector(weight), vector(bias), silu, array(y))
    if wide:
        conv_state.copy_(state)
    return y.to(x.dtype)


def _fake_step(conv_state, x, weight, bias, silu):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_step = Operator(
    "cpu_causal_conv1d_step", "cpu", _run_step, fake=_fake_step, mutates=["conv_state"]
)


def causal_conv1d_step(
    conv_state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """Arguments as in `mambakit.ops.causal_conv1d_step`."""
    y: Tensor = _step(conv_state, x, weight, bias, activation == "silu")
    return y
