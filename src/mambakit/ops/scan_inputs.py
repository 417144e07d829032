"""What the backends of the selective scan make of its arguments before their kernels run."""

from __future__ import annotations

import torch
from torch import Tensor


def of_one_kind(
    A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All complex64 if A is complex, and C doubled, so that the kernels' Re(sum_n C h) is y; as they are if not."""
    if not A.is_complex():
        return A, B, C, state
    A, B, C = (parameter.to(torch.complex64).resolve_conj() for parameter in (A, B, C))
    return A, B, 2 * C, None if state is None else state.to(torch.complex64)


def restarts(seq_idx: Tensor | None) -> Tensor | None:
    """Where the state starts afresh, (B, L), bool: where the document number changes."""
    if seq_idx is None:
        return None
    restart = torch.zeros_like(seq_idx, dtype=torch.bool)
    restart[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return restart
