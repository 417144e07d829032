"""Matrix products whose results are wider than their factors: float32 of half precision, never rounded in between."""

from __future__ import annotations

import torch
from torch import Tensor

WIDENS = torch.torch_version.TorchVersion(torch.__version__) >= "2.11"
"""Whether PyTorch's products on a GPU do it; where they do not, a product is rounded first."""


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left right, for matrices (I, K), (K, J) and (I, J); gives out."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if WIDENS and out.is_cuda:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.copy_(left @ right)


def multiply_add(left: Tensor, right: Tensor, total: Tensor) -> Tensor:
    """total += left right, for matrices (I, K), (K, J) and (I, J); gives total."""
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    if WIDENS and total.is_cuda:
        return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    return total.add_(left @ right)
