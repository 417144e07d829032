"""Perplexity and bits per byte of a language model on a text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mambakit.data.loader import Batch
from mambakit.data.tokenizer import Tokenizer
from mambakit.errors import DataError
from mambakit.models.language_model import MambaLanguageModel


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text, from sums over all predicted tokens."""

    nats: float
    """Sum of -ln p(token | tokens before it)."""
    tokens: int
    """Predicted tokens."""
    bytes: int
    """UTF-8 bytes that they stand for; document separators have none."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(min(self.loss, 700.0))  # float64 ends at exp(709).

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which models with different tokenizers can be compared by."""
        return self.nats / math.log(2) / self.bytes


@torch.no_grad()
def score(model: MambaLanguageModel, batches: Iterable[Batch], bytes_per_token: Tensor) -> Score:
    """Score a model on batches; each row starts from an empty state.

    Args:
        model: Put into evaluation mode meanwhile. Runs on its own device, under the caller's
            autocast, if any.
        batches: As `mambakit.data.windows` gives them.
        bytes_per_token: From `count_bytes`, (V,) int64.

    Returns:
        The sums. Float64 over batches, each a float32 mean.

    Raises:
        DataError: The batches hold no text.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = total_bytes = 0
    for batch in batches:
        on_device = batch.to(device)
        loss, _ = model.loss(on_device.tokens, on_device.targets, seq_idx=on_device.seq_idx)
        nats += loss.double() * batch.targets.numel()
        tokens += batch.targets.numel()
        total_bytes += int(bytes_per_token[batch.targets].sum())
    model.train(was_training)
    if not total_bytes:
        raise DataError("the text to evaluate on is empty; choose a longer one")
    return Score(nats.item(), tokens, total_bytes)


def count_bytes(tokenizer: Tokenizer) -> Tensor:
    """UTF-8 bytes of each token id, (V,) int64."""
    ids = range(tokenizer.vocab_size)
    return torch.tensor([len(tokenizer.decode_bytes([index])) for index in ids])
