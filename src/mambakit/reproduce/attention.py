"""The attention-only baseline of the induction heads: two layers of attention, three kinds of positions."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mambakit.nn.embedding import embed

Positions = Literal["absolute", "rope", "xpos"]
_WAVELENGTHS = 10000.0
_XPOS_GAMMA = 0.4
_XPOS_SCALE = 512.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes of an `AttentionModel`; the defaults are the paper's, 137K parameters."""

    d_model: int = 128
    """Width of the residual stream (M)."""
    n_layer: int = 2
    """Layers of attention."""
    n_head: int = 8
    """Heads (H)."""
    vocab_size: int = 16
    """Number of tokens (V)."""
    positions: Positions = "rope"
    """absolute (sines added to the embedding), rope or xpos."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)


class AttentionModel(nn.Module):
    """Embedding, pre-norm layers of causal attention with biases and no MLP, LayerNorm, head.

    The sizes are those of the paper's baseline: the parameters add up to its 137K. Attention is PyTorch's
    `scaled_dot_product_attention`; positions are sines (Vaswani et al. 2017), RoPE (Su et al. 2021) or xPos (Sun et al.
    2022, arXiv 2212.10554: RoPE, with q_n growing and k_n shrinking with n, so that far keys count less).

    Args:
        config: Sizes.
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.n_layer)])
        self.norm_f = nn.LayerNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head sees: tokens (B, L) to (B, L, M)."""
        hidden = embed(self.embedding, tokens)
        seqlen, config = tokens.shape[1], self.config
        if config.positions == "absolute":
            angles = _angles(seqlen, config.d_model, tokens.device)
            hidden = hidden + torch.cat([angles.cos(), angles.sin()], dim=-1)
        rotations = _rotations(seqlen, config, tokens.device)
        for layer in self.layers:
            hidden = layer(hidden, rotations)
        out: Tensor = self.norm_f(hidden)
        return out

    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())


Rotations = tuple[Tensor, Tensor]
"""The complex number that turns each pair of numbers at each position, (L, d_head / 2): for queries and for keys."""


class _Layer(nn.Module):
    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.norm = nn.LayerNorm(config.d_model)
        self.qkv_proj = nn.Linear(config.d_model, 3 * config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, hidden: Tensor, rotations: Rotations | None) -> Tensor:
        """(B, L, M) to (B, L, M)."""
        qkv = self.qkv_proj(self.norm(hidden)).unflatten(-1, (3, self.n_head, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        if rotations is not None:
            q, k = _rotate(q, rotations[0]), _rotate(k, rotations[1])
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = hidden + self.out_proj(y.transpose(1, 2).flatten(2))
        return out


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply the pairs (x_2i, x_2i+1) of x, (B, H, L, d_head), as complex numbers."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def _rotations(seqlen: int, config: AttentionConfig, device: torch.device) -> Rotations | None:
    if config.positions == "absolute":
        return None
    d_head = config.d_model // config.n_head
    angles = _angles(seqlen, d_head, device)
    if config.positions == "rope":
        rotation = torch.polar(torch.ones_like(angles), angles)
        return rotation, rotation
    even = torch.arange(0, d_head, 2, device=device)
    base = (even / d_head + _XPOS_GAMMA) / (1 + _XPOS_GAMMA)
    # Only differences of positions matter; from the middle, powers are in float32's range twice as far.
    places = torch.arange(seqlen, device=device) - seqlen // 2
    scale = base ** (places[:, None] / _XPOS_SCALE)
    return torch.polar(scale, angles), torch.polar(1 / scale, angles)


def _angles(seqlen: int, width: int, device: torch.device) -> Tensor:
    """The angle of each pair of `width` numbers at each position, (L, width / 2)."""
    even = torch.arange(0, width, 2, device=device)
    places = torch.arange(seqlen, device=device)
    return places[:, None] * _WAVELENGTHS ** (-even / width)
