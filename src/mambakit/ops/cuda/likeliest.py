"""The likeliest token of each row of logits on a GPU; see `kernels/likeliest.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops.cuda.arrays import TYPES, Variants, lanes, readable
from mambakit.ops.cuda.compiler import kernel

WARPS = 32
"""Of a block, which has a row."""


def likeliest(logits: Tensor) -> Tensor:
    """Arguments as in `mambakit.ops.likeliest.likeliest`."""
    logits = readable(logits)
    rows, size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    # A row's end need not be a whole access, its beginning has to.
    most = lanes(16 // logits.element_size(), 0, logits)
    launch = kernel("likeliest.cu", "likeliest", logits.device, **_constants(logits.dtype, most))
    launch(rows, 32 * WARPS, logits, logits.stride(0), tokens, size)
    return tokens


def _constants(io: torch.dtype, along: int) -> dict[str, int | str]:
    return {"IO": TYPES[io], "LANES": along, "WARPS": WARPS}


def variants() -> Variants:
    """The kernels of all dtypes."""
    return [
        ("likeliest.cu", "likeliest", _constants(dtype, along))
        for dtype, along in ((torch.float32, 4), (torch.bfloat16, 8), (torch.float16, 1))
    ]
