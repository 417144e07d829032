"""What a mixer remembers of the sequence so far: an explicit object, passed in and out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.export
from torch import Tensor


@dataclasses.dataclass
class MixerState:
    """State of one mixer after some tokens, for a batch of B sequences.

    Attributes:
        conv_state: The last W - 1 inputs of the convolution, (B, D, W-1), in its dtype.
        ssm_state: State of the scan, (B, D, N), float32 (complex64 for a complex A).
    """

    conv_state: Tensor
    ssm_state: Tensor

    @property
    def batch_size(self) -> int:
        """Number of sequences (B)."""
        return self.ssm_state.shape[0]

    def clone(self) -> MixerState:
        """A copy that later steps do not change."""
        return self._map(Tensor.clone)

    def detach(self) -> MixerState:
        """The same values, cut off from the graph: gradients stop here."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> MixerState:
        """The state on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor) -> MixerState:
        """A copy of some sequences, by number (int64; repeats are allowed)."""
        return self._map(lambda tensor: tensor.index_select(0, rows))

    def reset(self) -> None:
        """Forget everything, in place."""
        with torch.no_grad():
            self.conv_state.zero_()
            self.ssm_state.zero_()

    @staticmethod
    def cat(states: Sequence[MixerState]) -> MixerState:
        """Join batches of sequences into one."""
        return MixerState(
            torch.cat([state.conv_state for state in states]),
            torch.cat([state.ssm_state for state in states]),
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> MixerState:
        return MixerState(function(self.conv_state), function(self.ssm_state))


# So that `torch.export` and PyTorch's trees look into it; the name is written into exported files.
torch.export.register_dataclass(MixerState, serialized_type_name="mambakit.MixerState")
# And so that `torch.load` reads it in a file without trusting the file otherwise.
torch.serialization.add_safe_globals([MixerState])
