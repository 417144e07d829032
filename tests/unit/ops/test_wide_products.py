"""Products that are wider than their factors; on a GPU: tests/gpu/test_training.py."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops.wide_products import multiply, multiply_add


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_into_float32(dtype: torch.dtype) -> None:
    left, right, total = torch.randn(3, 4).to(dtype), torch.randn(4, 5).to(dtype), torch.ones(3, 5)
    out = torch.empty(3, 5)
    assert multiply(left, right, out) is out
    product = left.double() @ right.double()
    error = 1e-6 if dtype == torch.float32 else 2**-8 * product.abs().max()
    assert (out - product).abs().max() < error
    assert multiply_add(left, right, total) is total
    assert (total - 1 - product).abs().max() < error
