"""The likeliest token of each row of logits: what greedy decoding takes."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import cuda
from mambakit.ops.checks import check_float, check_rank
from mambakit.ops.dispatch import resolve_backend
from mambakit.ops.operators import is_observed

NOT_FINITE = -1
"""In place of a token, where the logits hold NaN or +inf, or -inf only."""


def likeliest(logits: Tensor, *, backend: str = "auto") -> Tensor:
    """The first of the largest logits of each row.

    Args:
        logits: (B, V) with V at least 1, any float dtype.
        backend: "auto", "cuda", "cpu" or "reference". Only a GPU has a kernel of its own.

    Returns:
        Its place, (B,), int64; `NOT_FINITE` where it is not finite.

    Raises:
        ShapeError, DtypeError: The argument does not fit.
        BackendError: The named backend cannot run this call here.

    Numerics: logits are compared in float32.

    Example:
        >>> import torch
        >>> likeliest(torch.tensor([[1.0, 3.0, 3.0], [0.0, float("nan"), 1.0]]))
        tensor([ 1, -1])
    """
    check_rank("logits", logits, 2, "(B, V)")
    check_float(logits=logits)
    chosen = resolve_backend(backend, logits.device, logits.dtype)
    if chosen == "cuda" and not is_observed((logits,)):
        found: Tensor = cuda.likeliest.likeliest(logits)
        return found
    peak, tokens = logits.float().max(dim=-1)
    return torch.where(torch.isfinite(peak), tokens, NOT_FINITE)
