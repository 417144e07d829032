"""The embedding of a small vocabulary: PyTorch's values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mambakit.nn import embedding
from mambakit.nn.embedding import MOST_ROWS, embed
from mambakit.nn.quantised_linear import QuantisedEmbedding, QuantisedLinear
from mambakit.ops.quantisation import quantise_weight


@pytest.fixture
def product_on_cpu(monkeypatch) -> None:
    monkeypatch.setattr(embedding, "PRODUCT_ON", ("cpu",))


def gradient(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(hidden.sin().sum(), weight)[0]


@pytest.mark.parametrize("shape", [(3, 70), (5,), (2, 1, 4), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients(product_on_cpu, shape, dtype):
    layer = nn.Embedding(7, 5, dtype=dtype)
    tokens = torch.randint(7, shape)
    ours, theirs = embed(layer, tokens), layer(tokens)
    assert type(ours.grad_fn) is not type(theirs.grad_fn)  # It is the other way, indeed.
    assert torch.equal(ours, theirs)
    wide = layer.weight.detach().double().requires_grad_()
    wanted = gradient(nn.functional.embedding(tokens, wide), wide)
    tolerance = {"rtol": 2e-2, "atol": 0.2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(gradient(ours, layer.weight), wanted.to(dtype), **tolerance)


def test_under_autocast_it_stays_float32(product_on_cpu):
    layer = nn.Embedding(7, 5)
    tokens = torch.randint(7, (3, 70))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = embed(layer, tokens)
        ours = gradient(hidden, layer.weight)
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(ours, gradient(layer(tokens), layer.weight))


def test_it_is_differentiable_twice(product_on_cpu):
    layer, tokens = nn.Embedding(4, 2, dtype=torch.float64), torch.randint(4, (2, 3))

    def hidden(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (tokens,)).sin()

    def ours(weight: torch.Tensor) -> torch.Tensor:
        return embedding._Rows.apply(weight, tokens).sin()

    weight = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    seconds = []
    for function in (ours, hidden):
        (first,) = torch.autograd.grad(function(weight).sum(), weight, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), weight)[0])
    torch.testing.assert_close(*seconds)


def is_ours(layer: nn.Embedding, tokens: torch.Tensor) -> bool:
    return "_Rows" in type(embed(layer, tokens).grad_fn).__name__


def test_it_keeps_out_of_the_way(product_on_cpu, monkeypatch):
    tokens = torch.randint(5, (2, 3))
    assert is_ours(nn.Embedding(MOST_ROWS, 2), tokens)
    assert not is_ours(nn.Embedding(MOST_ROWS + 1, 2), tokens)
    hooked = nn.Embedding(5, 2)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_ours(hooked, tokens)
    with torch.no_grad():
        assert embed(nn.Embedding(5, 2), tokens).grad_fn is None
    assert embed(nn.Embedding(5, 2).requires_grad_(False), tokens).grad_fn is None
    monkeypatch.setattr(embedding, "PRODUCT_ON", ("cuda",))
    assert not is_ours(nn.Embedding(5, 2), tokens)


def test_a_quantised_embedding_answers_itself(product_on_cpu):
    table = QuantisedLinear(quantise_weight(torch.randn(7, 64), bits=8, group_size=64))
    layer, tokens = QuantisedEmbedding(table), torch.tensor([[3, 0, 6]])
    assert torch.equal(embed(layer, tokens), layer(tokens))
