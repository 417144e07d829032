"""The embedding of a small vocabulary on a GPU: PyTorch's values, and gradients that are the same bits every time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mambakit.nn.embedding import embed

pytestmark = pytest.mark.gpu


def test_values_and_gradients():
    torch.manual_seed(0)
    layer = nn.Embedding(16, 64, device="cuda")
    tokens = torch.randint(16, (8, 4128), device="cuda")
    tokens[torch.rand(8, 4128, device="cuda") < 0.9] = (
        0  # Most tokens are of one kind, as in selective copying.
    )
    factors = torch.randn(8, 4128, 64, device="cuda")

    def gradient(hidden: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((hidden * factors).sum(), layer.weight)[0]

    hidden = embed(layer, tokens)
    assert torch.equal(hidden, layer(tokens))
    ours = gradient(hidden)
    wanted = torch.zeros(16, 64, dtype=torch.float64, device="cuda")
    wanted.index_add_(0, tokens.flatten(), factors.double().flatten(0, 1))
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-3)
    assert all(torch.equal(gradient(embed(layer, tokens)), ours) for _ in range(3))
