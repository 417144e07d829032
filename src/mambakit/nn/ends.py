"""Where the sequences of a batch end, when they are read for what comes after them."""

from __future__ import annotations

import torch
from torch import Tensor

STILL = -1e4
"""A dt whose softplus, after any sensible bias, is zero in every dtype: it moves no state."""


class Ends:
    """The last position of each sequence; what comes after it is padding, and leaves the state as it is.

    Args:
        lengths: Positions of each sequence that count, (B,), integers from 0 to L; None: all of them.
        seqlen: L.
    """

    def __init__(self, lengths: Tensor | None, seqlen: int) -> None:
        self._lengths = lengths
        if lengths is not None:
            positions = torch.arange(seqlen, device=lengths.device)
            self._padding = (positions >= lengths[:, None])[..., None]
            self._last = (lengths - 1).clamp(min=0)[:, None, None]

    def last(self, x: Tensor) -> Tensor:
        """Of each sequence what is at its last position, or at the first if it has none: (B, L, K) to (B, K)."""
        if self._lengths is None:
            return x[:, -1]
        return x.gather(1, self._last.expand(-1, 1, x.shape[2]))[:, 0]

    def without_padding(self, dt: Tensor) -> Tensor:
        """dt, (B, L, D), before its bias and softplus, with a scan standing still in the padding."""
        return dt if self._lengths is None else dt.masked_fill(self._padding, STILL)

    def last_inputs(self, found: Tensor, x: Tensor, before: Tensor | None) -> Tensor:
        """The state of a convolution after each sequence, (B, D, W-1).

        Args:
            found: What it is after the padding.
            x: Its inputs, (B, L, D).
            before: Its state before them; default: zeros.
        """
        if self._lengths is None:
            return found
        count = found.shape[2]
        places = self._lengths[:, None] + torch.arange(-count, 0, device=x.device)  # (B, W-1)
        taken = x.gather(1, places.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
        taken = taken.mT.contiguous()
        if before is None:
            return taken.masked_fill((places < 0)[:, None], 0)
        old = (places + count).clamp(max=count - 1)[:, None].expand_as(taken)
        return torch.where((places < 0)[:, None], before.to(x.dtype).gather(2, old), taken)


WHOLE = Ends(None, 0)
"""Of sequences without padding, of any length."""
