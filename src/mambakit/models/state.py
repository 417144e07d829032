"""What a language model remembers of the tokens so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.export
from torch import Tensor

from mambakit.nn.state import MixerState


@dataclasses.dataclass
class ModelState:
    """The states of all layers, for a batch of sequences; its size does not grow with their length.

    Attributes:
        layers: State of each mixer, first layer first.
    """

    layers: list[MixerState]

    @property
    def batch_size(self) -> int:
        """Number of sequences (B)."""
        return self.layers[0].batch_size

    def clone(self) -> ModelState:
        """A copy that later steps do not change."""
        return ModelState([layer.clone() for layer in self.layers])

    def detach(self) -> ModelState:
        """The same values, cut off from the graph: gradients stop here."""
        return ModelState([layer.detach() for layer in self.layers])

    def to(self, device: torch.device | str) -> ModelState:
        """The state on another device."""
        return ModelState([layer.to(device) for layer in self.layers])

    def select(self, rows: Tensor) -> ModelState:
        """A copy of some sequences, by number (int64; repeats are allowed)."""
        return ModelState([layer.select(rows) for layer in self.layers])

    def reset(self) -> None:
        """Forget everything, in place."""
        for layer in self.layers:
            layer.reset()

    @staticmethod
    def cat(states: Sequence[ModelState]) -> ModelState:
        """Join batches of sequences into one."""
        layers = zip(*(state.layers for state in states), strict=True)
        return ModelState([MixerState.cat(layer) for layer in layers])


# So that `torch.export` and PyTorch's trees look into it; the name is written into exported files.
torch.export.register_dataclass(ModelState, serialized_type_name="mambakit.ModelState")
# And so that `torch.load` reads it in a file without trusting the file otherwise.
torch.serialization.add_safe_globals([ModelState])
