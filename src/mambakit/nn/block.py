"""One layer of the network: pre-norm and mixer around the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambakit.nn.ends import WHOLE, Ends
from mambakit.nn.mixer import MambaMixer
from mambakit.nn.norm import RMSNorm
from mambakit.nn.state import MixerState


class Block(nn.Module):
    """residual' = residual + hidden;  hidden' = mixer(norm(residual')).

    The sum of the last two is left to the next norm, which fuses it.

    Args:
        norm: Normalises the residual stream.
        mixer: Mixes in time.
        residual_in_fp32: Whether the residual stream is at least float32.
    """

    def __init__(self, norm: RMSNorm, mixer: MambaMixer, residual_in_fp32: bool = True) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.residual_in_fp32 = residual_in_fp32

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None = None,
        state: MixerState | None = None,
        *,
        seq_idx: Tensor | None = None,
        ends: Ends = WHOLE,
        only_last: bool = False,
    ) -> tuple[Tensor, Tensor, MixerState]:
        """Run a sequence.

        Args:
            hidden: Output of the previous block, (B, L, M).
            residual: The residual stream without it, (B, L, M); None in front of the first block.
            state: What came before; default: nothing.
            seq_idx: Document number of each position, (B, L).
            ends: The last positions, behind which there is padding. Default: there is none.
            only_last: Whether nothing but these goes on, (B, 1, M).

        Returns:
            hidden and residual for the next block, and the state after the last position.
        """
        hidden, residual = self._add_norm(hidden, residual)
        hidden, state = self.mixer(hidden, state, seq_idx=seq_idx, ends=ends, only_last=only_last)
        if only_last:
            residual = ends.last(residual)[:, None]
        return hidden, residual, state

    def step(
        self, hidden: Tensor, residual: Tensor | None, state: MixerState
    ) -> tuple[Tensor, Tensor]:
        """Run one position, (B, M); `state` is updated in place. Has no gradient."""
        hidden, residual = self._add_norm(hidden, residual)
        return self.mixer.step(hidden, state), residual

    def _add_norm(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is not None:
            return self.norm.add(hidden, residual)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return self.norm(hidden), hidden.to(wide) if self.residual_in_fp32 else hidden
