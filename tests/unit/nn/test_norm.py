from __future__ import annotations

import torch

from mambakit.nn import RMSNorm


def test_forward_and_add():
    norm = RMSNorm(4, eps=1e-3)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x, residual = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    expected = (x + residual) / ((x + residual).square().mean(-1, keepdim=True) + 1e-3).sqrt()
    y, total = norm.add(x, residual)
    torch.testing.assert_close(y, expected * norm.weight)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(norm(x + residual), y)


def test_bfloat16_into_a_float32_residual_stream():
    norm = RMSNorm(4).bfloat16()
    x, residual = torch.randn(3, 4).bfloat16(), torch.randn(3, 4)
    y, total = norm.add(x, residual)
    assert y.dtype == torch.bfloat16
    assert total.dtype == torch.float32
    assert torch.equal(total, x.float() + residual)
