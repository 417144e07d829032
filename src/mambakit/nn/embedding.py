"""The embedding of a small vocabulary, whose gradient is a matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from mambakit.nn.recomputation import is_eager_autograd, is_plain

PRODUCT_ON = ("cuda",)
"""Devices where the gradient is a product. A CPU adds rows as fast as it reads them."""

MOST_ROWS = 64
"""Largest vocabulary of which the product takes less time than PyTorch's way."""


def embed(layer: nn.Module, tokens: Tensor) -> Tensor:
    """`layer(tokens)`, (B, L) to (B, L, M).

    PyTorch's gradient sorts the tokens, and adds up equal ones with atomic additions, in an order that changes from run
    to run. With few rows, each of which stands for thousands of tokens, the product with a matrix of ones and zeros is
    faster, and the same bits every time.

    Args:
        layer: An `nn.Embedding` made with no options but its sizes, or what stands in its place.
        tokens: Integers, (B, L).
    """
    # What is not plain, such as a quantised embedding, need not know its number of rows.
    if (
        isinstance(layer, nn.Embedding)
        and is_plain(layer, nn.Embedding)
        and layer.num_embeddings <= MOST_ROWS
        and tokens.device.type in PRODUCT_ON
        and is_eager_autograd()
    ):
        hidden: Tensor = _Rows.apply(layer.weight, tokens)  # type: ignore[no-untyped-call]
        return hidden
    plain: Tensor = layer(tokens)
    return plain


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = weight.shape[0]
        return embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        rows = torch.arange(ctx.rows, device=tokens.device)
        is_row = (tokens.flatten() == rows[:, None]).to(gradient.dtype)
        with torch.autocast(gradient.device.type, enabled=False):
            return is_row.mm(gradient.flatten(0, -2)), None
