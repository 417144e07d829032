"""The causal depthwise convolution on a GPU: PyTorch operators around `kernels/causal_conv1d_*.cu`."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from mambakit.ops.cuda.arrays import TYPES, Variants, lanes, multiprocessors, parameter, readable
from mambakit.ops.cuda.compiler import kernel
from mambakit.ops.gradient_room import room_for
from mambakit.ops.operators import Operator

WARPS, STEPS, ADDERS = 4, 8, 8
"""Warps of a block; rows that are on their way to a thread; warps that share the runs of a sum of parameters."""

RESIDENT, BACKWARD_RESIDENT = 6, 3
"""Blocks that a multiprocessor holds at a time: so many registers are left to a thread."""

NUMBERS = 16
"""Taps of all channels that a thread has. Twice as many make wider accesses, and were slower: fewer warps."""

WARPS_OF_ALL = 96
"""Warps for each multiprocessor, in turns, that the forward cuts a batch into."""

BACKWARD_WARPS, ENOUGH, FEW_WARPS = 48, 96, 8
"""The same of the backward, if each walks enough steps; if not, few warps, all at a time. Each leaves sums behind, and
reads rows before and after its own."""

SHORTEST, LONGEST = 16, 256
"""Time steps that a thread walks. Sums over more would be less exact."""


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as in `mambakit.ops.causal_conv1d`."""
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)
    y, state = _forward(x, weight, bias, initial_state, seq_idx, activation == "silu")
    return y, state


def _run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    seq_idx: Optional[Tensor],
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    state = x.new_empty(_state_shape(x, weight))
    if y.numel() == 0:
        return y, state.zero_() if initial_state is None else state.copy_(initial_state)
    x = readable(x)
    along = lanes(_most(x, weight), x.shape[2], x)
    constants, inputs = _prepare(RESIDENT, along, x, weight, bias, initial_state, seq_idx, silu)
    run = _run(x, along, WARPS_OF_ALL)
    launch = kernel("causal_conv1d_forward.cu", "causal_conv1d_forward", x.device, **constants)
    launch(_blocks(x, along, run), 32 * WARPS, *inputs, y, state, *x.shape, run)
    return y, state


def _fake_forward(x, weight, bias, initial_state, seq_idx, silu):
    return x.new_empty(x.shape), x.new_empty(_state_shape(x, weight))


def _run_backward(
    dy: Tensor,
    dstate: Optional[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    seq_idx: Optional[Tensor],
    silu: bool,
    room: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (of no elements if there is none) and the initial state (float32).

    That of x is put into `room`, if there is one.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if room is None else room
    dinitial = torch.empty(_state_shape(x, weight), device=x.device)
    if x.numel() == 0:
        dbias = x.new_empty(0) if bias is None else torch.zeros_like(bias)
        dinitial = dinitial.zero_() if dstate is None else dinitial.copy_(dstate)
        return dx, torch.zeros_like(weight), dbias, dinitial
    x, dy = readable(x), readable(dy)
    along = lanes(_most(x, weight), x.shape[2], x, dy, dx)
    constants, inputs = _prepare(
        BACKWARD_RESIDENT, along, x, weight, bias, initial_state, seq_idx, silu
    )
    run = _backward_run(x, along)
    batch, seqlen, channels = x.shape
    width = weight.shape[1]
    parts = torch.empty(batch * -(-seqlen // run), width + 1, channels, device=x.device)
    launch = kernel("causal_conv1d_backward.cu", "causal_conv1d_backward", x.device, **constants)
    launch(
        _blocks(x, along, run), 32 * WARPS, *inputs, dy, *dy.stride()[:2], dstate, *_strides(dstate),
        dx, *dx.stride()[:2], dinitial, parts, *x.shape, run,
    )  # fmt: skip
    filters = inputs[3]
    dweight = torch.empty(filters.shape, dtype=filters.dtype, device=x.device)
    dbias = x.new_empty(0) if bias is None else dweight.new_empty(bias.shape)
    add = kernel("causal_conv1d_backward.cu", "causal_conv1d_add_parts", x.device, **constants)
    add(
        -(-(width + 1) * channels // 32), 32 * ADDERS,
        parts, dweight, None if bias is None else dbias, len(parts), channels, overlaps=True,
    )  # fmt: skip
    return dx, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype), dinitial


def _fake_backward(dy, dstate, x, weight, bias, initial_state, seq_idx, silu, room):
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    dinitial = x.new_empty(_state_shape(x, weight), dtype=torch.float32)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dinitial


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # Once: activation checkpointing gives them out only once.
    x, _, bias, initial_state, _ = saved
    dy = torch.zeros_like(x) if dy is None else dy
    room = room_for(ctx, saved, 0)
    dx, dweight, dbias, dinitial = _backward(dy, dstate, *saved, ctx.silu, room)
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if initial_state is None else dinitial.to(initial_state.dtype),
        None,
        None,
    )


_forward = Operator(
    "cuda_causal_conv1d", "cuda", _run_forward,
    fake=_fake_forward, setup=_setup, gradients=_gradients,
)  # fmt: skip
_backward = Operator("cuda_causal_conv1d_backward", "cuda", _run_backward, fake=_fake_backward)


def _state_shape(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], weight.shape[1] - 1


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()


def _most(x: Tensor, weight: Tensor) -> int:
    """Channels of a thread: a power of two, so that their taps fit and an access has at most 16 bytes."""
    fitting = max(1, NUMBERS // weight.shape[1])
    return min(16 // x.element_size(), 1 << (fitting.bit_length() - 1))


def _columns(x: Tensor, along: int) -> int:
    """Warps that have all channels of a time step."""
    return -(-x.shape[2] // (32 * along))


def _run(x: Tensor, along: int, warps: int) -> int:
    """Time steps of a thread, so that there are about so many warps for each multiprocessor."""
    runs = warps * multiprocessors(x.device) // (_columns(x, along) * x.shape[0])
    run = -(-x.shape[1] // max(1, runs * STEPS)) * STEPS
    return min(max(run, SHORTEST), LONGEST)


def _backward_run(x: Tensor, along: int) -> int:
    run = _run(x, along, BACKWARD_WARPS)
    return run if run >= ENOUGH else _run(x, along, FEW_WARPS)


def _blocks(x: Tensor, along: int, run: int) -> int:
    return -(-_columns(x, along) * x.shape[0] * -(-x.shape[1] // run) // WARPS)


def _prepare(
    resident: int,
    along: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[dict[str, int | str], tuple[Any, ...]]:
    """Constants of a kernel, and the arguments that both passes begin with."""
    if bias is not None and bias.dtype != weight.dtype:
        weight, bias = weight.float(), bias.float()
    filters, bias = parameter(weight), parameter(bias)
    assert filters is not None
    index = None if seq_idx is None else seq_idx.dtype
    constants = _constants(resident, x.dtype, filters.dtype, weight.shape[1], along, silu, index)
    inputs = (
        x, *x.stride()[:2], filters, bias, initial_state, *_strides(initial_state),
        None if seq_idx is None else seq_idx.contiguous(),
    )  # fmt: skip
    return constants, inputs


def _constants(
    resident: int,
    io: torch.dtype,
    parameters: torch.dtype,
    width: int,
    along: int,
    silu: bool,
    index: torch.dtype | None,
) -> dict[str, int | str]:
    return {
        "IO": TYPES[io],
        "PARAMETER": TYPES[parameters],
        "WIDTH": width,
        "LANES": along,
        "SILU": int(silu),
        "PACKED": int(index is not None),
        "INDEX": "int64" if index == torch.int64 else "int",
        "WARPS": WARPS,
        "STEPS": STEPS,
        "ADDERS": ADDERS,
        "RESIDENT": resident,
    }


def _run_step(
    conv_state: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if bias is not None and bias.dtype != weight.dtype:
        weight, bias = weight.float(), bias.float()
    filters, bias = parameter(weight), parameter(bias)
    assert filters is not None
    batch, channels = x.shape
    launch = kernel(
        "causal_conv1d_step.cu", "causal_conv1d_step", x.device, IO=TYPES[x.dtype],
        PARAMETER=TYPES[filters.dtype], WIDTH=weight.shape[1], SILU=int(silu),
    )  # fmt: skip
    launch(
        (-(-channels // 128), min(batch, 65535)), 128, conv_state, *conv_state.stride(), x, *x.stride(), filters, bias,
        y, batch, channels,
    )  # fmt: skip
    return y


def _fake_step(conv_state, x, weight, bias, silu):
    return x.new_empty(x.shape)


_step = Operator(
    "cuda_causal_conv1d_step", "cuda", _run_step, fake=_fake_step, mutates=["conv_state"]
)


def causal_conv1d_step(
    conv_state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """Arguments as in `mambakit.ops.causal_conv1d_step`."""
    y: Tensor = _step(conv_state, x, weight, bias, activation == "silu")
    return y


def variants() -> Variants:
    """The kernels of the usual widths and dtypes; every branch of the sources is in one of them."""
    found: Variants = []
    for name, resident in (("forward", RESIDENT), ("backward", BACKWARD_RESIDENT)):
        for dtype, width, index in (
            (torch.bfloat16, 4, None),
            (torch.float16, 4, torch.int64),
            (torch.float32, 4, None),
            (torch.bfloat16, 7, None),
        ):
            most = _most(torch.empty(0, dtype=dtype), torch.empty(0, width))
            constants = _constants(resident, dtype, torch.float32, width, most, True, index)
            found.append((f"causal_conv1d_{name}.cu", f"causal_conv1d_{name}", constants))
    step: dict[str, int | str] = {"IO": "bfloat16", "PARAMETER": "float", "WIDTH": 4, "SILU": 1}
    return [*found, ("causal_conv1d_step.cu", "causal_conv1d_step", step)]
