"""One decoding step of a whole model, or of a mixer, in one compiled call: nothing but the memory's speed holds it up.

Operation by operation, Python and the hand-overs between threads take as long as reading the weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mambakit.ops.cpu.arrays import array
from mambakit.ops.cpu.linear import SMALL
from mambakit.ops.cpu.threads import run
from mambakit.ops.model_layer import Layer
from mambakit.ops.quantisation import GROUP_SIZES

NAP_SECONDS = 1e-4


UNIT = 16
"""Rows of a matrix, or channels, in the smallest task: some microseconds, by which threads may end apart."""


class Head(NamedTuple):
    """The last norm, (M,), and the head, (V, M), in the form of the layers' matrices."""

    norm: Tensor
    weight: Tensor
    scales: Tensor | None


def suitable(layers: Sequence[Layer], head: Head) -> bool:
    """Whether the kernel can read them where they lie, and has a form for their dtypes."""
    small, matrix, scale = (None if t is None else t.dtype for t in head)
    if (small, matrix, scale) not in _FORMS:
        return False
    steering = torch.int8 if scale else matrix
    exact = torch.float32
    wanted = [
        small,
        matrix,
        small,
        small,
        steering,
        steering,
        exact,
        exact,
        exact,
        matrix,
        small,
        exact,
    ]
    wanted += [scale] * 4
    for layer in layers:
        if [None if t is None else t.dtype for t in layer] != wanted:
            return False
    tensors = [t for t in chain(head, *layers) if t is not None]
    return all(t.is_cpu and t.is_contiguous() for t in tensors)


_FORMS = (
    (torch.float32, torch.float32, None),
    (torch.bfloat16, torch.bfloat16, None),
    (torch.float32, torch.int8, torch.bfloat16),
    (torch.float32, torch.int16, torch.bfloat16),
)
"""Dtypes of norms and convolutions, of matrices, of their scales."""


class ModelStep:
    """One decoding step of a whole model, again and again: addresses and buffers are looked up once.

    Tensors are `suitable`. A row does not depend on the other rows of the batch, nor on the number of threads.
    What is between matrices is float32; codes are multiplied with it as in `mambakit.ops.quantised_linear`.
    Two threads must not call one at the same time, as they must not step one state.

    Args:
        layers: First layer first.
        head: What follows them.
        eps: Of the norm of each layer, and of the last norm.
        mixer_eps: Of the norms of dt, B and C; None: there are none.
    """

    def __init__(
        self, layers: Sequence[Layer], head: Head, eps: Sequence[float], mixer_eps: float | None
    ) -> None:
        from mambakit.ops.cpu.kernels.model_step import PARTS

        self._sizes = _sizes(layers, head)
        self._layers, self._head = layers, head  # Which keeps what lies at the addresses.
        addresses = [0 if t is None else t.data_ptr() for t in chain.from_iterable(layers)]
        small = array(head.norm)
        self._model = (
            np.array(addresses, np.int64).view(_ADDRESSES),
            np.array(eps, np.float32),
            None if mixer_eps is None else np.float32(mixer_eps),
            small,
            array(layers[0].x_proj[:0, :0].reshape(-1)),
            _NO_SCALES if head.scales is None else array(head.scales),
            array(head.weight),
        )
        self._rows = _rows(layers[0], head, self._sizes)
        self._end = PARTS * len(layers) + 2
        self._counters = np.zeros((2, self._end), np.int64)
        self._weights = len(layers) * layers[0].in_proj.numel() + head.weight.numel()
        self._states = [state for la in layers for state in (la.conv_state, la.ssm_state)]

    def __call__(self, embedded: Tensor) -> Tensor:
        """Logits, (B, V) in the dtype of the norms, from the embeddings of a token a sequence, (B, M) float32.

        The states move on.
        """
        logits = self._head.norm.new_empty(embedded.shape[0], self._head.weight.shape[0])
        rows = self._rows._replace(logits=array(logits))
        rows.residual[:] = array(embedded)
        rows.hidden[:] = 0
        self._share(0, self._end, rows)
        return logits

    def mix(self, hidden: Tensor) -> Tensor:
        """The mixer of the first layer alone, from (B, M) to (B, M) in the same dtype. Its states move on."""
        from mambakit.ops.cpu.kernels.model_step import IN_PROJ, PARTS

        self._rows.normed.values[:] = hidden.float().numpy()
        self._share(IN_PROJ, PARTS, self._rows)
        return torch.from_numpy(self._rows.hidden).to(hidden.dtype)

    def _share(self, first: int, end: int, rows: Any) -> None:
        """Share the tasks of the phases from first to end among threads."""
        self._counters[:] = 0
        threads = torch.get_num_threads() if self._weights > SMALL else 1
        run(_walk, threads, first, end, threads, self._sizes, *self._model, rows, *self._counters)
        increment_version(self._states)


def mixer_step(mixer: Layer, hidden: Tensor) -> Tensor | None:
    """One decoding step of a mixer, in the place of its operations; None if the kernel has no form for it.

    Args:
        mixer: Its tensors, but for `norm`, which is empty. The states move on.
        hidden: (B, M), in the dtype of the matrices.

    Returns:
        (B, M).
    """
    nothing = Head(mixer.norm, mixer.in_proj[:0], None)
    if hidden.dtype != mixer.in_proj.dtype or not suitable([mixer], nothing):
        return None
    return ModelStep([mixer], nothing, (), None).mix(hidden)


_ADDRESSES = np.dtype([(name, np.int64) for name in Layer._fields])
_NO_SCALES = np.empty((0, 0), np.uint16)


def _sizes(layers: Sequence[Layer], head: Head) -> Any:
    """Sizes of the model and of units, which hold whole groups of what is rounded."""
    from mambakit.ops.cpu.kernels.model_step import Sizes

    first = layers[0]
    d_inner, d_state = first.A_log.shape
    d_model = first.out_proj.shape[0]
    dt_rank = first.x_proj.shape[0] - 2 * d_state
    return Sizes(
        len(layers), d_model, d_inner, d_state, first.conv.shape[-1], dt_rank,
        rows=UNIT, channels=UNIT if head.scales is None else max(GROUP_SIZES),
    )  # fmt: skip


def _rows(layer: Layer, head: Head, sizes: Any) -> Any:
    """What the phases hand on, but for the logits; codes and steps are zeros, as their padding has to be."""
    from mambakit.ops.cpu.kernels.model_step import Rows
    from mambakit.ops.cpu.kernels.operand import Operand

    batch = layer.ssm_state.shape[0]

    def empty(size: int) -> Any:
        return np.empty((batch, size), np.float32)

    def operand(size: int, scales: Tensor | None, group: int) -> Any:
        groups = 0 if scales is None else scales.shape[1]
        codes = np.zeros((batch, groups * group), np.int16)
        return Operand(empty(size), codes, np.zeros((batch, groups), np.float32))

    # Matrices of eight bits have as many codes a row as columns.
    group = 0 if layer.x_scales is None else layer.x_proj.shape[1] // layer.x_scales.shape[1]
    return Rows(
        hidden=empty(sizes.d_model),
        residual=empty(sizes.d_model),
        normed=operand(sizes.d_model, layer.in_scales, group),
        xz=empty(2 * sizes.d_inner),
        x=operand(sizes.d_inner, layer.x_scales, group),
        steering=operand(sizes.dt_rank + 2 * sizes.d_state, layer.dt_scales, group),
        dt=empty(sizes.d_inner),
        y=operand(sizes.d_inner, layer.out_scales, group),
        logits=array(head.norm[:0].reshape(0, 0)),
    )


def _walk(first: int, last: int, phase: int, end: int, *args: Any) -> None:
    """A thread's part in the step; when it has waited too long, others get its processor for a while."""
    from mambakit.ops.cpu.kernels.model_step import walk

    while (phase := walk(phase, end, *args)) < end:
        time.sleep(NAP_SECONDS)
