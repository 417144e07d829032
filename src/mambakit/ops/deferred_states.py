"""States of the scan that a step writes every second time only.

A step of many rows is bound by the states, of which it reads and writes every one. What a state is made of in a step
(dt, x and B) is a twentieth of it: so a step may keep that and not write the state, and the next one does it again
before its own, with the same bits. Half of the rows are written in each step. Until `settle` nothing but such steps may
read the states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mambakit.ops.model_layer import Layer
from mambakit.ops.selective_scan import selective_scan_step

KEEPS, REPEATS, WRITES = range(3)
"""A row's turn; see `StateTurn` in cuda/kernels/decode_rows_model.cuh."""


@dataclasses.dataclass
class DeferredStates:
    """What the states of some sequences, as they were written, have not read.

    Attributes:
        inputs: dt, after softplus, and x, after the convolution, (layers, 2, B, D), in the dtype of the model.
        B: (layers, B, N), in that dtype.
        turns: Whether a row has been written, (B,), int32.
    """

    inputs: Tensor
    B: Tensor
    turns: Tensor

    @staticmethod
    def empty(shape: Sequence[int], like: Tensor) -> DeferredStates:
        """Of states that have been written, (layers, B, D, N); with the dtype and device of a tensor."""
        layers, rows, channels, states = shape
        deferred = DeferredStates(
            like.new_zeros(layers, 2, rows, channels),
            like.new_zeros(layers, rows, states),
            torch.empty(rows, dtype=torch.int32, device=like.device),
        )
        deferred.reset()
        return deferred

    def view(self, rows: int) -> DeferredStates:
        """Of the first rows, in place."""
        return DeferredStates(self.inputs[:, :, :rows], self.B[:, :rows], self.turns[:rows])

    def reset(self) -> None:
        """The states have been written."""
        rows = torch.arange(self.turns.shape[0], device=self.turns.device)
        self.turns.copy_(first_turn(rows))

    def put(self, row: int) -> None:
        """The state of a row has been written."""
        self.turns[row] = first_turn(row)

    def move(self, source: int, target: int) -> None:
        """A row's state has been copied over another's."""
        for tensor, rows in ((self.inputs, 2), (self.B, 1), (self.turns, 0)):
            tensor.select(rows, target).copy_(tensor.select(rows, source))

    @torch.no_grad()
    def settle(self, layers: Sequence[Layer]) -> None:
        """Write all states of these layers, of as many rows."""
        is_behind = (self.turns == REPEATS)[:, None]
        for layer, (dt, x), B in zip(layers, self.inputs, self.B, strict=True):
            # A step of no time leaves a state as it is.
            selective_scan_step(layer.ssm_state, x, dt * is_behind, -layer.A_log.exp(), B, B)
        self.reset()


_Rows = TypeVar("_Rows", int, Tensor)


def first_turn(row: _Rows) -> _Rows:
    """Of a row that has been written: pairs, which are scanned together, take turns."""
    return row // 2 % 2 * WRITES
