"""The Transformer that Mamba is compared with: "Transformer++" of the paper, on the same ops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, silu

from mambakit.errors import ArgumentError, DtypeError, ShapeError
from mambakit.models.transformer_config import TransformerConfig
from mambakit.nn.linear import Linear
from mambakit.nn.norm import RMSNorm
from mambakit.ops import linear_cross_entropy

Rotation = tuple[Tensor, Tensor]
"""cos and sin of the angle of each pair of numbers at each position, (L, d_head / 2), float32."""


@dataclasses.dataclass
class LayerCache:
    """Keys and values of one layer, for T positions of which the first are taken.

    Attributes:
        keys: (B, H, T, d_head), rotated.
        values: (B, H, T, d_head).
    """

    keys: Tensor
    values: Tensor


@dataclasses.dataclass
class TransformerState:
    """What a Transformer remembers: keys and values of all tokens so far, in memory of a fixed size.

    It carries no gradient.

    Attributes:
        layers: The cache of each layer, first layer first.
        position: Number of tokens read so far, the same for all sequences, int64, (), on the device
            of the caches, so that a step need not wait for it.
    """

    layers: list[LayerCache]
    position: Tensor

    @property
    def batch_size(self) -> int:
        """Number of sequences (B)."""
        return self.layers[0].keys.shape[0]

    @property
    def max_length(self) -> int:
        """Most tokens that fit (T)."""
        return self.layers[0].keys.shape[2]

    def clone(self) -> TransformerState:
        """A copy that later steps do not change."""
        layers = [LayerCache(layer.keys.clone(), layer.values.clone()) for layer in self.layers]
        return TransformerState(layers, self.position.clone())

    def reset(self) -> None:
        """Forget everything, in place; what is behind the position is never read."""
        self.position.zero_()


class Attention(nn.Module):
    """Causal softmax attention with rotary position embedding.

    Args:
        d_model: Width of the input and the output (M).
        n_head: Heads (H).
    """

    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv_proj = Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = Linear(d_model, d_model, bias=False)

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation,
        cache: LayerCache | None,
        positions: Tensor,
        visible: Tensor | None,
    ) -> tuple[Tensor, LayerCache]:
        """Attend from every position to itself and those before it.

        Args:
            hidden: (B, L, M).
            rotation: Of the positions; see `rotary_embedding`.
            cache: What came before; None: nothing.
            positions: Places in the cache, (L,).
            visible: With a cache, which of its places each position attends to, (L, T), bool.

        Returns:
            (B, L, M), and the cache with the new keys and values; `cache` stays as it is.
        """
        q, k, v = self._heads(self.qkv_proj(hidden), rotation)
        if cache is None:
            y = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k = cache.keys.index_copy(2, positions, k.to(cache.keys.dtype))
            v = cache.values.index_copy(2, positions, v.to(cache.values.dtype))
            y = scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.out_proj(_joined(y)), LayerCache(k.detach(), v.detach())

    def step(
        self,
        hidden: Tensor,
        rotation: Rotation,
        cache: LayerCache,
        position: Tensor,
        visible: Tensor,
    ) -> Tensor:
        """One position, (B, M) to (B, M); `cache` is updated in place. Has no gradient."""
        q, k, v = self._heads(self.qkv_proj(hidden)[:, None], rotation)
        cache.keys.index_copy_(2, position, k.to(cache.keys.dtype))
        cache.values.index_copy_(2, position, v.to(cache.values.dtype))
        y = scaled_dot_product_attention(q, cache.keys, cache.values, attn_mask=visible)
        out: Tensor = self.out_proj(_joined(y)[:, 0])
        return out

    def _heads(self, qkv: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, L, d_head)."""
        q, k, v = (
            x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2) for x in qkv.chunk(3, dim=-1)
        )
        return rotate(q, rotation), rotate(k, rotation), v


def _joined(heads: Tensor) -> Tensor:
    """(B, H, L, d_head) to (B, L, M)."""
    return heads.transpose(1, 2).flatten(2)


class SwiGLU(nn.Module):
    """y = down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202).

    Args:
        d_model: Width of the input and the output (M).
        d_mlp: Inner width.
    """

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(d_model, 2 * d_mlp, bias=False)
        self.down_proj = Linear(d_mlp, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., M) to (..., M)."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(silu(gate) * up)
        return out


class TransformerBlock(nn.Module):
    """Attention and MLP, each behind a norm of the residual stream, which the next norm adds up.

    Args:
        config: Sizes.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.attention = Attention(config.d_model, config.n_head)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.mlp = SwiGLU(config.d_model, config.resolved_d_mlp)


class TransformerLanguageModel(nn.Module):
    """Predicts the next token, as `MambaLanguageModel` does and through the same interface.

    Pre-norm with RMSNorm, rotary position embedding, SwiGLU, no biases, head tied to the
    embedding. Attention is PyTorch's `scaled_dot_product_attention` (FlashAttention on a GPU in
    half precision); norms and loss are the ops of mambakit. It exists for comparisons.

    Args:
        config: Sizes and switches.

    Example:
        >>> import torch
        >>> from mambakit.models import TransformerConfig, TransformerLanguageModel
        >>> model = TransformerLanguageModel(TransformerConfig(d_model=16, n_layer=2, n_head=2, vocab_size=8))
        >>> logits, state = model(torch.tensor([[1, 2, 3]]))
        >>> logits.shape, state.max_length
        (torch.Size([1, 3, 8]), 3)
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList([TransformerBlock(config) for _ in range(config.n_layer)])
        self.norm_f = RMSNorm(config.d_model, config.norm_epsilon)
        self.lm_head = Linear(config.d_model, config.padded_vocab_size, bias=False)
        self._initialise()
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def forward(
        self, tokens: Tensor, state: TransformerState | None = None
    ) -> tuple[Tensor, TransformerState]:
        """Logits of the token after each position.

        Args:
            tokens: (B, L).
            state: What came before, with room for L more; it stays as it is. Default: nothing.

        Returns:
            Logits, (B, L, V), and the state after the last position. Without a state before, it is
            just as long as the tokens.

        Raises:
            ArgumentError: A shape or dtype does not fit, or the state is full.
        """
        hidden, state = self.hidden(tokens, state)
        return self.lm_head(hidden), state

    def hidden(
        self, tokens: Tensor, state: TransformerState | None = None
    ) -> tuple[Tensor, TransformerState]:
        """What the head sees, (B, L, M), and the state; arguments as in `forward`."""
        self._check(tokens, 2, state)
        seqlen = tokens.shape[1]
        positions = torch.arange(seqlen, device=tokens.device)
        visible = None
        if state is not None:
            positions = state.position + positions
            visible = torch.arange(state.max_length, device=tokens.device) <= positions[:, None]
        rotation = rotary_embedding(positions, self.config)

        hidden: Tensor = self.embedding(tokens)
        residual: Tensor | None = None
        caches = [None] * self.config.n_layer if state is None else state.layers
        layers = []
        for block, cache in zip(self.blocks(), caches, strict=True):
            hidden, residual = self._add_norm(block.norm, hidden, residual)
            hidden, layer = block.attention(hidden, rotation, cache, positions, visible)
            hidden, residual = block.mlp_norm.add(hidden, residual)
            hidden = block.mlp(hidden)
            layers.append(layer)
        assert residual is not None  # There is at least one block.
        after = positions[-1] + 1
        return self.norm_f.add(hidden, residual)[0], TransformerState(layers, after)

    def loss(
        self, tokens: Tensor, targets: Tensor, *, state: TransformerState | None = None
    ) -> tuple[Tensor, TransformerState]:
        """Mean cross-entropy, in nats, of the targets; the logits are never held whole.

        Args:
            tokens: (B, L).
            targets: The token after each position, (B, L); -100 does not count.
            state: What came before; default: nothing.

        Returns:
            The loss, a float32 scalar, and the state after the last position.
        """
        hidden, state = self.hidden(tokens, state)
        return linear_cross_entropy(hidden, self.lm_head.weight, targets), state

    @torch.no_grad()
    def prefill(
        self,
        tokens: Tensor,
        state: TransformerState | None = None,
        *,
        max_length: int | None = None,
    ) -> tuple[Tensor, TransformerState]:
        """Read a prompt: logits for the token after it, and the state to go on from.

        Args:
            tokens: (B, L).
            state: What came before; it stays as it is. Default: nothing, which is fastest.
            max_length: Without a state: most tokens, prompt included, that the new one has room
                for. Default: those of the prompt.

        Returns:
            Logits of the last position, (B, V), and the state.
        """
        hidden, after = self.hidden(tokens, state)
        if state is None and max_length is not None:
            if max_length < after.max_length:
                raise ArgumentError(
                    f"max_length: got {max_length}, wanted at least the {after.max_length} tokens"
                )
            room = (0, 0, 0, max_length - after.max_length)
            after.layers = [
                LayerCache(pad(layer.keys, room), pad(layer.values, room)) for layer in after.layers
            ]
        return self.lm_head(hidden[:, -1]), after

    @torch.no_grad()
    def step(self, tokens: Tensor, state: TransformerState) -> Tensor:
        """Read one token a sequence, (B,); return logits, (B, V), and update `state` in place."""
        self._check(tokens, 1, state)
        position = state.position[None]
        visible = (torch.arange(state.max_length, device=tokens.device) <= position)[None]
        rotation = rotary_embedding(position, self.config)
        hidden: Tensor = self.embedding(tokens)
        residual: Tensor | None = None
        for block, cache in zip(self.blocks(), state.layers, strict=True):
            hidden, residual = self._add_norm(block.norm, hidden, residual)
            hidden = block.attention.step(hidden, rotation, cache, position, visible)
            hidden, residual = block.mlp_norm.add(hidden, residual)
            hidden = block.mlp(hidden)
        assert residual is not None
        state.position.add_(1)
        logits: Tensor = self.lm_head(self.norm_f.add(hidden, residual)[0])
        return logits

    def initial_state(self, batch: int, max_length: int) -> TransformerState:
        """The state before any token, with room for `max_length`, on the device of the weights."""
        config, weight = self.config, self.embedding.weight
        device, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        shape = (batch, config.n_head, max_length, config.d_head)

        def empty() -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        layers = [LayerCache(empty(), empty()) for _ in range(config.n_layer)]
        return TransformerState(layers, torch.zeros((), device=device, dtype=torch.int64))

    def blocks(self) -> Iterator[TransformerBlock]:
        """The layers, first to last, with their type."""
        return iter(cast("Iterable[TransformerBlock]", self.layers))

    def num_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, seqlen: int) -> int:
        """Floating point operations of forward and backward for one token of a sequence.

        6 for each weight of a matrix (2 forward, 4 backward), and 6 L M a layer for attention: two
        products over half of the L positions on average. Recomputation does not count.

        Args:
            seqlen: Length of the sequence (L).
        """
        weights = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        attention = 6 * seqlen * self.config.d_model * self.config.n_layer
        return 6 * sum(weight.numel() for weight in weights) + attention

    def _add_norm(
        self, norm: RMSNorm, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if residual is not None:
            return norm.add(hidden, residual)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return norm(hidden), hidden.to(wide) if self.config.residual_in_fp32 else hidden

    def _initialise(self) -> None:
        """N(0, 0.02); the last layers of each branch smaller, so that depth adds no variance (GPT-2)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        with torch.no_grad():
            for block in self.blocks():
                for last in (block.attention.out_proj, block.mlp.down_proj):
                    last.weight /= math.sqrt(2 * self.config.n_layer)

    def _check(self, tokens: Tensor, rank: int, state: TransformerState | None) -> None:
        if tokens.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"tokens: got dtype {tokens.dtype}, wanted int32 or int64")
        shape = tuple(tokens.shape)
        if len(shape) != rank or (rank == 2 and shape[1] == 0):
            letters = "(B, L) with L at least 1" if rank == 2 else "(B,)"
            raise ShapeError(f"tokens: got shape {shape}, wanted {letters}")
        if state is None:
            return
        if state.batch_size != shape[0]:
            got, wanted = state.batch_size, shape[0]
            raise ShapeError(f"state: got {got} sequences, wanted {wanted} like tokens")
        # On an accelerator the position is not looked at, since that would wait for it; an index
        # out of range stops the program there.
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            needed = int(state.position) + (shape[1] if rank == 2 else 1)
            if needed > state.max_length:
                raise ArgumentError(
                    f"state: has room for {state.max_length} tokens, wanted {needed}; "
                    "make it with a larger max_length"
                )


def rotary_embedding(positions: Tensor, config: TransformerConfig) -> Rotation:
    """Turns of each pair of numbers at each position (Su et al. 2021, arXiv 2104.09864)."""
    even = torch.arange(0, config.d_head, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None] * config.rope_theta ** (-even / config.d_head)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (x_i, x_{i + d_head / 2}) of x, (B, H, L, d_head)."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
