"""Random inputs of a scan, with every option present or absent."""

from __future__ import annotations

import torch
from accuracy import Tensors
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ("x", "dt", "z", "B", "C")
OPTIONAL = ("D", "z", "dt_bias", "initial_state")


def case(
    batch: int = 2,
    seqlen: int = 67,
    d_inner: int = 96,
    d_state: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    groups: int | None = None,
    constant: str = "",
    absent: tuple[str, ...] = (),
    is_complex: bool = False,
) -> Tensors:
    weight = torch.complex64 if is_complex else torch.float32
    states = (d_state,) if groups is None else (groups, d_state)
    A = -torch.rand(d_inner, d_state) * torch.arange(1, d_state + 1) - 0.01
    if is_complex:
        A = torch.complex(A, 3 * torch.randn_like(A))
    tensors = {
        "x": torch.randn(batch, seqlen, d_inner),
        "dt": torch.randn(batch, seqlen, d_inner) / 2 - 2,
        "A": A,
        "B": torch.randn(batch, seqlen, *states, dtype=weight),
        "C": torch.randn(batch, seqlen, *states, dtype=weight),
        "D": torch.randn(d_inner),
        "z": torch.randn(batch, seqlen, d_inner),
        "dt_bias": torch.randn(d_inner) / 10,
        "initial_state": torch.randn(batch, d_inner, d_state, dtype=weight),
    }
    for name in constant:
        tensors[name] = torch.randn(d_inner, d_state, dtype=weight)
    for name in ACTIVATIONS:
        if not tensors[name].is_complex():
            tensors[name] = tensors[name].to(dtype)
    return {k: None if k in absent else v for k, v in tensors.items()}


def documents(batch: int, seqlen: int) -> Tensor:
    """Runs of random lengths, one number used twice."""
    return (torch.rand(batch, seqlen) < 0.1).cumsum(1) % 3
