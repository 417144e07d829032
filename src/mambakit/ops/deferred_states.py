"""States of the scan that a step writes every second time only.

A step of many rows is bound by the states, of which it reads and writes every one. What a state is made of in a step
(dt, x and B) is a twentieth of it: so a step may keep that and not write the state, and the next one does it again
before its own, with the same bits. Half of the rows are written in each step. Until they are settled
(`mambakit.ops.cuda.settle_states`) nothing but such steps may read the states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

KEEPS, REPEATS, WRITES = range(3)
"""A row's turn; see `StateTurn` in cuda/kernels/decode_rows_model.cuh."""


@dataclasses.dataclass
class DeferredStates:
    """What the states of some sequences, as they were written, have not read.

    Attributes:
        inputs: dt, after softplus, and x, after the convolution, (layers, 2, B, D), in the dtype of the model.
        B: (layers, B, N), in that dtype.
        turns: Whether a row has been written, (B,), int32.
        first_turns: Of rows that have been, (B,), int32.
    """

    inputs: Tensor
    B: Tensor
    turns: Tensor
    first_turns: Tensor

    @property
    def stored_rows(self) -> int:
        """As many as B of what this is a view of."""
        return self.inputs.stride(1) // self.inputs.stride(2)

    @staticmethod
    def empty(shape: Sequence[int], like: Tensor) -> DeferredStates:
        """Of states that have been written, (layers, B, D, N); with the dtype and device of a tensor."""
        layers, rows, channels, states = shape
        # Pairs, which are scanned together, take turns.
        first_turns = (torch.arange(rows, device=like.device) // 2 % 2 * WRITES).int()
        return DeferredStates(
            like.new_zeros(layers, 2, rows, channels),
            like.new_zeros(layers, rows, states),
            first_turns.clone(),
            first_turns,
        )

    def view(self, rows: int) -> DeferredStates:
        """Of the first rows, in place."""
        inputs, B = self.inputs[:, :, :rows], self.B[:, :rows]
        return DeferredStates(inputs, B, self.turns[:rows], self.first_turns[:rows])

    def reset(self) -> None:
        """The states have been written."""
        self.turns.copy_(self.first_turns)

    def put(self, row: int) -> None:
        """The state of a row has been written."""
        self.turns[row] = self.first_turns[row]

    def move(self, source: int, target: int) -> None:
        """A row's state has been copied over another's."""
        for tensor, rows in ((self.inputs, 2), (self.B, 1), (self.turns, 0)):
            tensor.select(rows, target).copy_(tensor.select(rows, source))
