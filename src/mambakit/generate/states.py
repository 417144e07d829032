"""Memory for the states of sequences, taken once: of all layers side by side, so that one is moved in few copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.state import ModelState
from mambakit.nn.state import MixerState
from mambakit.ops.deferred_states import DeferredStates


class States:
    """States of some sequences, a row each.

    Args:
        parts: Those of the convolutions and of the scans, (layers, rows, ...).

    Attributes:
        deferred: What the states of the scans have not read, if steps defer them.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = parts
        self.deferred: DeferredStates | None = None
        self._views: dict[int, ModelState] = {}

    @staticmethod
    def empty(model: MambaLanguageModel, rows: int) -> States:
        """Those of so many sequences before their first token, where the model is."""
        example = model.initial_state(1).layers
        return States(
            [
                one.new_zeros(len(example), rows, *one.shape[1:])
                for one in (example[0].conv_state, example[0].ssm_state)
            ]
        )

    @staticmethod
    def joined(state: ModelState) -> States:
        """A copy of a model's state."""
        return States(
            [
                torch.stack([layer.conv_state for layer in state.layers]),
                torch.stack([layer.ssm_state for layer in state.layers]),
            ]
        )

    def clone(self) -> States:
        """A copy that nothing else changes."""
        return States([part.clone() for part in self._parts])

    def view(self, rows: int) -> ModelState:
        """The states of the first rows, in place."""
        if rows not in self._views:
            layers = zip(*(part[:, :rows].unbind() for part in self._parts), strict=True)
            self._views[rows] = ModelState([MixerState(*layer) for layer in layers])
        return self._views[rows]

    def defer(self) -> DeferredStates:
        """From now on steps may defer the states."""
        if self.deferred is None:
            conv, ssm = self._parts
            self.deferred = DeferredStates.empty(ssm.shape, like=conv)
        return self.deferred

    def put(self, row: int, state: ModelState | None) -> None:
        """Copy the state of one sequence into a row; None: that before its first token."""
        for part, name in zip(self._parts, ("conv_state", "ssm_state"), strict=True):
            if state is None:
                part[:, row] = 0
            else:
                part[:, row] = torch.cat([getattr(layer, name) for layer in state.layers])
        if self.deferred is not None:
            self.deferred.put(row)

    def move(self, source: int, target: int) -> None:
        """Copy a row over another."""
        for part in self._parts:
            part[:, target] = part[:, source]
        if self.deferred is not None:
            self.deferred.move(source, target)
