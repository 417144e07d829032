"""The selective scan on an NVIDIA GPU: PyTorch operators around `kernels/selective_scan_*.cu`."""

from __future__ import annotations

import functools
import math
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn.functional import silu

from mambakit.ops.cuda.arrays import TYPES, lanes, multiprocessors, readable, shared_memory
from mambakit.ops.cuda.compiler import kernel
from mambakit.ops.cuda.launch import Kernel
from mambakit.ops.cuda.scan_layout import (
    BACKWARD,
    FEW_BACKWARD,
    FEW_FORWARD,
    FORWARD,
    MOST_STATES,
    NARROW,
    Pace,
    backward_kernel,
    forward_kernel,
    layout,
    narrow_kernel,
    narrow_time,
    plan,
    takes_narrow,
    variants,
)
from mambakit.ops.scan_gradients import operators
from mambakit.ops.scan_inputs import of_one_kind, restarts

__all__ = ["selective_scan", "variants"]

CHUNKS: int | None = None
"""How many chunks to cut time into, for tests; None lets `plan` choose."""
IS_FEW: bool | None = None
"""Whether blocks count as few where there is a choice, for tests; None lets `plan` choose."""
IS_NARROW: bool | None = None
"""Whether `scan_narrow` runs where it can, for tests; None lets `plan` choose."""


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
    if A.shape[1] > MOST_STATES:
        return _scan_in_slices(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx)
    A, B, C, initial_state = of_one_kind(A, B, C, initial_state)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, state, _ = _forward(*tensors, restarts(seq_idx), dt_softplus, save)
    return y, state


def _scan_in_slices(
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
    """More states than a warp holds: y is a sum over them, so slice after slice, without rounding in between."""
    wide = x.float()
    y = torch.zeros_like(wide) if D is None else D.float() * wide
    states = []
    for start in range(0, A.shape[1], MOST_STATES):
        n = slice(start, start + MOST_STATES)
        before = None if initial_state is None else initial_state[..., n]
        options = (None, None, dt_bias, dt_softplus, before, seq_idx)
        part, state = selective_scan(wide, dt, A[:, n], B[..., n], C[..., n], *options)
        y = y + part
        states.append(state)
    if z is not None:
        y = y * silu(z.float())
    return y.to(x.dtype), torch.cat(states, dim=-1)


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
    """y, the final state, and the state before each tile (of no tiles unless `save`)."""
    inputs = _Inputs(x, dt, A, B, C, D, z, dt_bias, restart, dt_softplus)
    batch, seqlen, d_inner = x.shape
    y = torch.empty(x.shape, dtype=inputs.io, device=x.device)
    final_state = torch.empty(batch, *A.shape, dtype=inputs.A.dtype, device=x.device)
    saved = _saved_like(x, A, save)
    start = None if initial_state is None else initial_state.to(A.dtype).contiguous()
    if batch == 0 or seqlen == 0 or d_inner == 0:
        return y.to(x.dtype), final_state.zero_() if start is None else start.clone(), saved
    tensors = (
        inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.dt_bias, start, inputs.restart,
        y, final_state, saved if save else None,
    )  # fmt: skip
    sizes = (seqlen, d_inner, A.shape[1], inputs.groups)
    strides = (
        *_rows(inputs.x), *_rows(inputs.dt), *_rows(inputs.z), *_weight_rows(inputs.B), *_weight_rows(inputs.C),
    )  # fmt: skip
    if inputs.is_narrow(keeps=save):
        inputs.run_narrow(*tensors, *sizes, *strides)
        return y.to(x.dtype), final_state, saved
    chunk, chunks = inputs.cut_forward()
    ends, sums = inputs.chunk_states(chunks)
    arguments = (*tensors, ends, sums, *sizes, chunk, chunks, *strides)
    if chunks > 1:
        inputs.run("CHUNK_STATES", (inputs.blocks, chunks - 1), *arguments)
    inputs.run("OUTPUTS", (inputs.blocks, chunks), *arguments)
    return y.to(x.dtype), final_state, saved


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
    room: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state (of no elements for absent inputs).

    That of z is put into `room`, a half of rows, if the dtype fits.
    """
    inputs = _Inputs(x, dt, A, B, C, D, z, dt_bias, restart, dt_softplus)
    form, padded = inputs.form, inputs.form.padded
    batch, seqlen, d_inner = x.shape
    d_state, device = A.shape[1], x.device

    def nothing() -> Tensor:
        # A new one each time: the outputs of an operator must not share memory.
        return torch.empty(0, device=device)

    if batch == 0 or seqlen == 0 or d_inner == 0:
        absent = (
            nothing() if t is None else torch.zeros_like(t) for t in (x, dt, A, B, C, D, z, dt_bias)
        )
        return *absent, dstate.clone()  # type: ignore[return-value]
    dout, dstate = readable(dy.to(inputs.io)), dstate.to(inputs.A.dtype).contiguous()
    if room is None or room.dtype != inputs.io:
        dx, ddt = (torch.empty(x.shape, dtype=inputs.io, device=device) for _ in range(2))
        dz = nothing() if z is None else torch.empty_like(dx)
    else:  # The rows of z's are twice as long, so those of the others are: the kernel has one place for all.
        both, dz = room.new_empty(batch, seqlen, 2, d_inner), room
        dx, ddt = both.unbind(2)
    dinitial = torch.empty_like(dstate)

    chunk, chunks = inputs.cut_backward()
    adjoints, sums = inputs.chunk_states(chunks)
    if chunks > 1:
        inputs.run(
            "CHUNK_ADJOINTS", (inputs.blocks, chunks - 1),
            dout, inputs.dt, inputs.A, inputs.C, None, None, inputs.z, inputs.dt_bias, None, inputs.restart, None, None,
            None, adjoints, sums, seqlen, d_inner, d_state, inputs.groups, chunk, chunks,
            *_rows(dout), *_rows(inputs.dt), *_rows(inputs.z), *_weight_rows(inputs.C), 0, 0, 0, 1,
        )  # fmt: skip

    def parts(weight: Tensor) -> Tensor:
        rows = (inputs.row_blocks, batch, seqlen) if weight.ndim > 2 else (batch, chunks, d_inner)
        return torch.empty(*rows, padded, dtype=inputs.A.dtype, device=device)

    dA_parts = torch.empty(batch, chunks, d_inner, padded, dtype=inputs.A.dtype, device=device)
    dB_parts, dC_parts = parts(B), parts(C)
    parts_of_time = torch.empty(2, batch, chunks, d_inner, device=device)

    def of_file(name: str) -> Kernel:
        size = inputs.x.element_size()
        options = inputs.backward_options(dout)
        file, _, constants = backward_kernel(form, size, name, options, inputs.is_few)
        return kernel(file, name, device, **constants)

    run, add = of_file("scan_backward"), of_file("scan_add_parts")
    run(
        (inputs.blocks, chunks), 32 * form.warps,
        dout, inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.dt_bias, inputs.restart,
        saved, dstate, adjoints, sums, dx, ddt, dz, dA_parts, dB_parts, dC_parts, *parts_of_time, dinitial,
        dx.stride(1), seqlen, d_inner, d_state, inputs.groups, chunk, chunks,
        *_rows(dout), *_rows(inputs.x), *_rows(inputs.dt), *_rows(inputs.z),
        *_weight_rows(inputs.B), *_weight_rows(inputs.C),
        shared=form.backward_bytes(inputs.x.element_size(), inputs.is_few),
    )  # fmt: skip

    dA, dB, dC = (
        torch.empty_like(W, memory_format=torch.contiguous_format)
        for W in (inputs.A, inputs.B, inputs.C)
    )
    dD, dbias = (torch.empty(d_inner, device=device) for _ in range(2))
    B_groups, C_groups = (_weight_rows(W)[3] for W in (inputs.B, inputs.C))
    most = max(d_inner, batch * seqlen * max(B_groups, C_groups))
    add(
        (-(-most * form.spread // 32), 4), 128,
        dA_parts, dB_parts, dC_parts, *parts_of_time, dA, dB, dC, dD, dbias,
        batch * seqlen, d_inner, d_state, B_groups, C_groups, inputs.row_blocks, batch * chunks,
    )  # fmt: skip

    def like(gradient: Tensor, parameter: Tensor | None) -> Tensor:
        return nothing() if parameter is None else gradient.to(parameter.dtype)

    return (
        like(dx, x),
        like(ddt, dt),
        like(dA, A),
        like(dB, B),
        like(dC, C),
        like(dD, D),
        like(dz, z),
        like(dbias, dt_bias),
        dinitial,
    )


def _saved_like(x: Tensor, A: Tensor, save: bool) -> Tensor:
    form = layout(A.shape[1], A.is_complex())
    batch, seqlen, d_inner = x.shape
    tiles = -(-seqlen // form.save_every) if save else 0
    dtype = torch.complex64 if A.is_complex() else torch.float32
    return x.new_empty(batch, tiles, d_inner, form.padded, dtype=dtype)


_forward, _backward = operators("cuda", _run_forward, _run_backward, _saved_like)


_layout = functools.cache(layout)
"""Of numbers; it takes 30 microseconds. The symbols of torch.compile, in `_saved_like`, have no hash."""


class _Inputs:
    """What all kernels of one scan read, in their form, and how they are launched."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        restart: Tensor | None,
        dt_softplus: bool,
    ) -> None:
        activations = [x, dt, *(W for W in (B, C) if W.ndim > 2 and not W.is_complex())]
        if z is not None:
            activations.append(z)
        one_dtype = all(t.dtype == x.dtype for t in activations)
        self.io = x.dtype if one_dtype else torch.float32
        number = torch.complex64 if A.is_complex() else torch.float32

        def weight(W: Tensor) -> Tensor:
            if W.ndim == 2:
                return W.to(number).resolve_conj().contiguous()
            return readable(W.to(number if W.is_complex() else self.io).resolve_conj())

        self.x, self.dt = readable(x.to(self.io)), readable(dt.to(self.io))
        self.z = None if z is None else readable(z.to(self.io))
        self.A = A.to(number).resolve_conj().contiguous()
        self.B, self.C = weight(B), weight(C)
        self.D = None if D is None else D.float().contiguous()
        self.dt_bias = None if dt_bias is None else dt_bias.float().contiguous()
        self.restart = restart
        self.dt_softplus = dt_softplus
        self.form = _layout(A.shape[1], A.is_complex())
        self.is_few = False
        self.groups = math.lcm(*(W.shape[2] for W in (B, C) if W.ndim == 4))

    @property
    def row_blocks(self) -> int:
        """Blocks of a batch row."""
        return self.groups * self.form.blocks(self.x.shape[2] // self.groups)

    @property
    def blocks(self) -> int:
        """Blocks of one chunk."""
        return self.x.shape[0] * self.row_blocks

    @property
    def narrow_blocks(self) -> int:
        """Blocks of `scan_narrow`."""
        return self.x.shape[0] * self.groups * NARROW.blocks(self.x.shape[2] // self.groups)

    def cut(self, pace: Pace) -> tuple[int, int]:
        """Steps of a chunk, a multiple of what kernels hold at a time, and the number of chunks."""
        seqlen = self.x.shape[1]
        chunks = CHUNKS or (1 if self.is_few else self.plan(pace)[0])
        chunk = -(-seqlen // (32 * chunks)) * 32
        return chunk, -(-seqlen // chunk)

    def plan(self, pace: Pace, most: int = 64) -> tuple[int, float]:
        """`plan` of these blocks."""
        return plan(self.blocks, self.x.shape[1], multiprocessors(self.x.device), pace, most)

    def forward_time(self, channels: int) -> float:
        """What `plan` estimates with so many channels a lane."""
        form, self.form = self.form, self.form._replace(channels=channels)
        (_, time), self.form = self.plan(FORWARD[channels]), form
        return time

    def cut_forward(self) -> tuple[int, int]:
        """As `cut`, with one channel a lane if that is faster: it makes twice as many blocks."""
        channels = min((n for n in FORWARD if n <= self.form.channels), key=self.forward_time)
        self.is_few = self.are_few(FEW_FORWARD, self.forward_time(channels))
        if self.is_few:
            return self.cut(FEW_FORWARD)
        self.form = self.form._replace(channels=channels)
        return self.cut(FORWARD[channels])

    def cut_backward(self) -> tuple[int, int]:
        """As `cut`."""
        memory = FEW_BACKWARD.resident * self.form.backward_bytes(self.x.element_size(), True)
        has_room = memory <= shared_memory(self.x.device)
        self.is_few = has_room and self.are_few(FEW_BACKWARD, self.plan(BACKWARD)[1])
        return self.cut(BACKWARD)

    def are_few(self, pace: Pace, others: float) -> bool:
        """Whether the blocks are one wave of `pace`, which takes less time than `others`."""
        if IS_FEW is not None or not self.form.on_tensor_cores:
            return bool(IS_FEW) and self.form.on_tensor_cores
        room = pace.resident * multiprocessors(self.x.device)
        return self.blocks <= room and self.plan(pace, most=1)[1] < others

    def is_narrow(self, keeps: bool) -> bool:
        """Whether `scan_narrow` knows the sizes, and is faster than any other way; with states kept, or without."""
        if CHUNKS is not None or not takes_narrow(self.form, self.x.element_size()):
            return False
        if IS_NARROW is not None:
            return IS_NARROW
        processors = multiprocessors(self.x.device)
        time = narrow_time(self.narrow_blocks, self.x.shape[1], processors, keeps)
        if self.are_few(FEW_FORWARD, time):
            return False
        return all(time < self.forward_time(channels) for channels in FORWARD)

    def chunk_states(self, chunks: int) -> tuple[Tensor | None, Tensor | None]:
        """Room for the state and the sum of dt of each chunk, if there are several."""
        if chunks == 1:
            return None, None
        batch, _, d_inner = self.x.shape
        states = self.A.new_empty(batch, chunks, d_inner, self.form.padded)
        return states, torch.empty(batch, chunks, d_inner, 2, device=self.x.device)

    def options(self, *others: Tensor, channels: int = 0) -> dict[str, int | str]:
        """What the kernels are compiled for: these tensors, and `others` that they read."""
        channels = channels or self.form.channels
        return {
            "IO": TYPES[self.io],
            "B_VARIES": int(self.B.ndim > 2),
            "C_VARIES": int(self.C.ndim > 2),
            "HAS_Z": int(self.z is not None),
            "SOFTPLUS": int(self.dt_softplus),
            "HAS_RESTART": int(self.restart is not None),
            "ALIGNED": int(self.neighbours(channels, *others) == channels),
        }

    def neighbours(self, most: int, *others: Tensor) -> int:
        """How many channels of these tensors, and of `others`, one access may move."""
        return lanes(most, self.x.shape[2] // self.groups, self.x, self.dt, self.z, *others)

    def backward_options(self, dout: Tensor) -> dict[str, int | str]:
        """As `options`, of the backward."""
        copied = self.neighbours(self.form.copied(self.x.element_size()), dout)
        weights = [W for W in (self.B, self.C) if W.ndim > 2]
        is_aligned = all(lanes(4, W.shape[-1], W) == 4 for W in weights)
        return {**self.options(dout), "COPIED": copied, "WEIGHTS_ALIGNED": int(is_aligned)}

    def run_narrow(self, *arguments: Any) -> None:
        """Launch `scan_narrow`."""
        options = self.options(channels=8)
        for name, weight in (("B", self.B), ("C", self.C)):
            options[f"{name}_LANES"] = lanes(8, weight.shape[-1], weight) if weight.ndim > 2 else 1
        file, name, constants = narrow_kernel(options)
        launch = kernel(file, name, self.x.device, **constants)
        launch(self.narrow_blocks, 64 * NARROW.warps, *arguments, shared=NARROW.bytes())

    def run(self, mode: str, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch `scan_forward`."""
        options = self.options(arguments[0])
        if mode == "CHUNK_ADJOINTS":
            options["B_VARIES"] = options["C_VARIES"]
        file, name, constants = forward_kernel(self.form, mode, options, self.is_few)
        launch = kernel(file, name, self.x.device, **constants)
        launch(grid, 32 * self.form.warps, *arguments, shared=self.form.forward_bytes())


def _rows(tensor: Tensor | None) -> tuple[int, int]:
    """Strides of batch and time."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _weight_rows(weight: Tensor) -> tuple[int, int, int, int]:
    """Strides of batch, time and group of B or C, and its number of groups."""
    if weight.ndim == 2:
        return 0, 0, 0, 1
    if weight.ndim == 3:
        return weight.stride(0), weight.stride(1), 0, 1
    batch, time, group, _ = weight.stride()
    return batch, time, group, weight.shape[2]
