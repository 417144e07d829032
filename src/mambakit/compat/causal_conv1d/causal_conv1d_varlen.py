"""`causal_conv1d.causal_conv1d_varlen`: states of sequences that lie one after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of each of several sequences.

    Args:
        x: Inputs of all sequences, (total length, D).
        cu_seqlens: Where each begins, and where the last ends, (B + 1,).
        state_len: How many inputs of each.

    Returns:
        (B, D, state_len), oldest first; zero in front of sequences that are shorter.
    """
    back = torch.arange(-state_len, 0, device=x.device)
    places = cu_seqlens[1:, None] + back
    is_within = places >= cu_seqlens[:-1, None]
    return torch.where(is_within[..., None], x[places.clamp(min=0)], 0).transpose(1, 2)


causal_conv1d_varlen_states_ref = causal_conv1d_varlen_states
