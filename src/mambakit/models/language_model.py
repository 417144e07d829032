"""The Mamba language model: embedding, blocks, norm, head."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from mambakit.errors import ArgumentError, DtypeError, ShapeError
from mambakit.models.config import MambaConfig
from mambakit.models.fused_step import can_defer, fused_step
from mambakit.models.state import ModelState
from mambakit.nn.block import Block
from mambakit.nn.embedding import embed
from mambakit.nn.ends import WHOLE, Ends
from mambakit.nn.h3 import H3Mixer
from mambakit.nn.linear import Linear
from mambakit.nn.mixer import MambaMixer
from mambakit.nn.norm import RMSNorm
from mambakit.nn.quantised_linear import QuantisedEmbedding, QuantisedLinear
from mambakit.nn.ungated import UngatedMixer
from mambakit.ops import linear_cross_entropy
from mambakit.ops.deferred_states import DeferredStates
from mambakit.ops.quantisation import dequantise

if TYPE_CHECKING:
    from mambakit.models.formats.layout import SavedTokenizer
    from mambakit.models.quantisation import Quantisation


class Backbone(nn.Module):
    """Embedding, blocks and final norm: tokens to hidden vectors.

    Args:
        config: Sizes and switches.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList([_make_block(config) for _ in range(config.n_layer)])
        self.norm_f = RMSNorm(config.d_model, config.norm_epsilon)
        self.activation_checkpointing = False

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        seq_idx: Tensor | None = None,
        lengths: Tensor | None = None,
        only_last: bool = False,
    ) -> tuple[Tensor, ModelState]:
        """Tokens (B, L) to hidden vectors (B, L, M), and the state; see `MambaLanguageModel.hidden`."""
        hidden = embed(self.embedding, tokens)
        residual: Tensor | None = None
        old_states = [None] * len(self.layers) if state is None else state.layers
        states = []
        ends = WHOLE if lengths is None else Ends(lengths, tokens.shape[1])
        # Only an adapter's dropout draws. The state of the generators cannot be read in a CUDA graph.
        draws = any(isinstance(module, nn.Dropout) for module in self.modules())
        for layer, (block, old_state) in enumerate(zip(self.blocks(), old_states, strict=True), 1):
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden, residual, new_state = checkpoint(
                    block, hidden, residual, old_state, seq_idx=seq_idx, ends=ends,
                    only_last=only_last and layer == len(self.layers), use_reentrant=False,
                    preserve_rng_state=draws,
                )  # fmt: skip
            else:
                hidden, residual, new_state = block(
                    hidden, residual, old_state, seq_idx=seq_idx, ends=ends,
                    only_last=only_last and layer == len(self.layers),
                )  # fmt: skip
            states.append(new_state)
        assert residual is not None  # There is at least one block.
        return self.norm_f.add(hidden, residual)[0], ModelState(states)

    def step(self, tokens: Tensor, state: ModelState) -> Tensor:
        """Tokens (B,) to hidden vectors (B, M); `state` is updated in place."""
        hidden: Tensor = self.embedding(tokens)
        residual: Tensor | None = None
        for block, layer_state in zip(self.blocks(), state.layers, strict=True):
            hidden, residual = block.step(hidden, residual, layer_state)
        assert residual is not None
        return self.norm_f.add(hidden, residual)[0]

    def blocks(self) -> Iterator[Block]:
        """The layers, first to last, with their type."""
        return iter(cast("Iterable[Block]", self.layers))


class MambaLanguageModel(nn.Module):
    """Predicts the next token. Weights are random; `from_pretrained` makes a model with those of a checkpoint.

    State-dict names equal those of the official checkpoints. Logits cover the padded vocabulary
    (V = config.padded_vocab_size); ids from config.vocab_size on stand for no token. Tokens are
    int32 or int64. On the CPU ids out of range raise an error; on an accelerator they are not
    looked at, since that would wait for it.

    Args:
        config: Sizes and switches.

    Attributes:
        quantisation: How the matrices are stored, after `mambakit.models.quantise`; None: as floats.
        name_or_path: Hub id or folder that the weights come from, which peft notes in adapters; None: none.

    Example:
        >>> import torch
        >>> from mambakit import MambaConfig, MambaLanguageModel
        >>> model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=8))
        >>> logits, state = model(torch.tensor([[1, 2, 3]]))
        >>> logits.shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.quantisation: Quantisation | None = None
        self.name_or_path: str | None = None
        self.backbone = Backbone(config)
        self.lm_head: Linear | QuantisedLinear = Linear(
            config.d_model, config.padded_vocab_size, bias=False
        )
        self._initialise()
        self.tie_weights()

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, *, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Logits of the token after each position.

        Args:
            tokens: (B, L).
            state: What came before; default: nothing.
            seq_idx: Document number of each position, (B, L), for several documents packed in a
                row: the state starts afresh where it changes.

        Returns:
            Logits, (B, L, V), and the state after the last position.

        Raises:
            ArgumentError: A token id is out of range, or a shape does not fit.
        """
        hidden, state = self.hidden(tokens, state, seq_idx=seq_idx)
        return self.lm_head(hidden), state

    def hidden(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        seq_idx: Tensor | None = None,
        lengths: Tensor | None = None,
        only_last: bool = False,
    ) -> tuple[Tensor, ModelState]:
        """What the head sees.

        Args:
            tokens: (B, L).
            state: What came before; default: nothing.
            seq_idx: Document number of each position, (B, L); see `forward`.
            lengths: Positions of each row that count, (B,); the rest is padding. Default: all.
            only_last: Whether nothing but the last position of each row is wanted, which takes less time.

        Returns:
            (B, L, M), or (B, 1, M), and the state after the last position that counts.
        """
        self._check(tokens, 2, state)
        hidden, state = self.backbone(
            tokens, state, seq_idx=seq_idx, lengths=lengths, only_last=only_last
        )
        return hidden, state

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        state: ModelState | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Mean cross-entropy, in nats, of the targets; the logits are never held whole.

        Args:
            tokens: (B, L).
            targets: The token after each position, (B, L); -100 does not count.
            state: What came before; default: nothing.
            seq_idx: Document number of each position, (B, L).

        Returns:
            The loss, a float32 scalar, and the state after the last position.
        """
        hidden, state = self.hidden(tokens, state, seq_idx=seq_idx)
        if isinstance(self.lm_head, nn.Linear):
            return linear_cross_entropy(hidden, self.lm_head.weight, targets), state
        if isinstance(self.lm_head, QuantisedLinear):
            weight = dequantise(self.lm_head.matrix, hidden.dtype)
            return linear_cross_entropy(hidden, weight, targets), state
        # An adapter wraps the head: its weight alone is not the whole layer.
        logits = self.lm_head(hidden).flatten(0, 1).float()
        return cross_entropy(logits, targets.flatten(), ignore_index=-100), state

    @torch.no_grad()
    def prefill(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        lengths: Tensor | None = None,
        chunk: int = 2048,
    ) -> tuple[Tensor, ModelState]:
        """Read prompts: logits for the token after each, and the state to go on from.

        Args:
            tokens: (B, L).
            state: What came before; it stays as it is. Default: nothing.
            lengths: Tokens of each prompt, (B,), integers from 1 to L; what comes after them in its row is
                padding, any ids. Default: L. On an accelerator they are not looked at.
            chunk: Most positions worked on at once, which bounds the memory.

        Returns:
            Logits of the last position of each prompt, (B, V), and the state.

        Raises:
            ArgumentError: A token id or a length is out of range, or a shape does not fit.
        """
        if chunk < 1:
            raise ArgumentError(f"chunk: got {chunk}, wanted at least 1")
        self._check(tokens, 2, state)
        _check_lengths(lengths, tokens)
        last: Tensor | None = None
        for first in range(0, tokens.shape[1], chunk):
            part = tokens[:, first : first + chunk]
            left = None if lengths is None else (lengths - first).clamp(0, part.shape[1])
            hidden, state = self.hidden(part, state, lengths=left, only_last=True)
            if last is not None and left is not None:
                hidden = torch.where((left > 0)[:, None, None], hidden, last)
            last = hidden
        assert last is not None
        assert state is not None
        return self.lm_head(last[:, 0]), state

    @torch.no_grad()
    def step(self, tokens: Tensor, state: ModelState) -> Tensor:
        """Read one token a sequence, (B,); return logits, (B, V), and update `state` in place."""
        self._check(tokens, 1, state)
        fused = fused_step(self, tokens.device, state)
        return self._step_by_modules(tokens, state) if fused is None else fused(tokens)

    def prepared_step(
        self, state: ModelState, deferred: DeferredStates | None = None
    ) -> Callable[[Tensor], Tensor]:
        """A function of tokens that does what `step` does with this state.

        It looks at modules, weights and state once, here, which takes a tenth of a small model's step
        on a CPU: none of them must be replaced while it is in use. Values may change.

        Args:
            state: Updated in place by each step.
            deferred: What the state has not read, for steps that write it every second time, which is faster; see
                `mambakit.models.fused_step.should_defer`. Only such steps can continue, until it is settled.

        Raises:
            ArgumentError: No such step works on this state.
        """
        if deferred is not None and not can_defer(self, state):
            raise ArgumentError("deferred: got some, wanted None: no kernel defers this state")
        fused = fused_step(self, state.layers[0].ssm_state.device, state, deferred)
        if fused is None:
            return partial(self.step, state=state)

        @torch.no_grad()
        def step(tokens: Tensor) -> Tensor:
            self._check(tokens, 1, state)
            return fused(tokens)

        return step

    def _step_by_modules(self, tokens: Tensor, state: ModelState) -> Tensor:
        logits: Tensor = self.lm_head(self.backbone.step(tokens, state))
        return logits

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 256,
        stop_ids: Sequence[int] = (),
        seed: int | Sequence[int] | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """Continue prompts of token ids; see `mambakit.generate.generate`.

        `sampling` takes the fields of `mambakit.generate.SamplingOptions`, such as temperature=0.8.
        """
        from mambakit.generate.generation import generate
        from mambakit.generate.options import SamplingOptions

        options = SamplingOptions(**sampling)
        return generate(self, prompts, options, max_tokens=max_tokens, stop_ids=stop_ids, seed=seed)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        revision: str | None = None,
    ) -> MambaLanguageModel:
        """Read a checkpoint, from a folder or the hub; see `mambakit.models.load_model`."""
        from mambakit.models.checkpoint import load_model

        return load_model(source, device, dtype, revision=revision)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        format: str = "mambakit",
        tokenizer: SavedTokenizer | None = None,
    ) -> None:
        """Write a checkpoint; see `mambakit.models.save_model`."""
        from mambakit.models.checkpoint import save_model

        save_model(self, folder, format, tokenizer)

    def initial_state(self, batch: int) -> ModelState:
        """The state before any token, for `batch` sequences, on the device of the weights."""
        return ModelState([block.mixer.initial_state(batch) for block in self.backbone.blocks()])

    @property
    def activation_checkpointing(self) -> bool:
        """Whether the backward pass computes each block again instead of keeping what is inside.

        That takes less memory, and a third more work. Settable.
        """
        return self.backbone.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        self.backbone.activation_checkpointing = value

    @property
    def recomputation(self) -> bool:
        """Whether the backward pass on a GPU makes x and dt of each mixer again instead of keeping them.

        As it is at first. Without, a step is 2 % faster and what is kept between the passes a third more. Settable.
        """
        return all(block.mixer.recomputes for block in self.backbone.blocks())

    @recomputation.setter
    def recomputation(self, value: bool) -> None:
        for block in self.backbone.blocks():
            block.mixer.recomputes = value

    def num_parameters(self) -> int:
        """Number of parameters, quantised ones too; a tied head counts once."""
        quantised = (m for m in self.modules() if isinstance(m, QuantisedLinear))
        codes = sum(layer.in_features * layer.out_features for layer in quantised)
        return codes + sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, seqlen: int) -> int:
        """Floating point operations of forward and backward for one token of a sequence.

        6 for each weight of a matrix and each tap of a convolution (2 forward, 4 backward, 2 if it is
        frozen; the embedding is looked up, the head is a matrix), and 3 * 7 for each state of a scan
        (dt A, exp, dt x B, two multiply-adds; complex: four times). Recomputation does not count.

        Args:
            seqlen: Length of the sequence. Mamba's cost of a token does not depend on it.
        """
        config = self.config
        if self.quantisation is not None:
            raise ArgumentError(
                "flops_per_token: a quantised model is not trained; ask a float one"
            )
        weights = [m.weight for m in self.modules() if isinstance(m, (nn.Linear, nn.Conv1d))]
        states = config.n_layer * config.d_inner * config.d_state * (4 if config.is_complex else 1)
        products = sum((6 if w.requires_grad else 4) * w.numel() for w in weights)
        return products + 3 * 7 * states

    def tie_weights(self) -> None:
        """Make the head share the weight of the embedding, if the config says so."""
        embedding: nn.Module = self.backbone.embedding
        if self.config.tie_embeddings and isinstance(embedding, QuantisedEmbedding):
            self.lm_head = embedding.table
        elif self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def _initialise(self) -> None:
        """What the layers' own initial values leave: embedding, biases, depth (authors' code)."""
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        for block in self.backbone.blocks():
            for projection in (block.mixer.in_proj, block.mixer.out_proj):
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
            # The variance of the residual stream then does not grow with the number of layers.
            with torch.no_grad():
                block.mixer.out_proj.weight /= math.sqrt(self.config.n_layer)

    def _check(self, tokens: Tensor, rank: int, state: ModelState | None) -> None:
        if tokens.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"tokens: got dtype {tokens.dtype}, wanted int32 or int64")
        shape = tuple(tokens.shape)
        if len(shape) != rank or (rank == 2 and shape[1] == 0):
            letters = "(B, L) with L at least 1" if rank == 2 else "(B,)"
            raise ShapeError(f"tokens: got shape {shape}, wanted {letters}")
        if state is not None and len(state.layers) != self.config.n_layer:
            got, wanted = len(state.layers), self.config.n_layer
            raise ShapeError(f"state: got {got} layers, wanted the model's {wanted}")
        if state is not None and state.batch_size != shape[0]:
            got, wanted = state.batch_size, shape[0]
            raise ShapeError(f"state: got {got} sequences, wanted {wanted} like tokens")
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = (int(id_) for id_ in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ArgumentError(
                    f"tokens: got id {low if low < 0 else high}, wanted 0 <= id < "
                    f"{self.config.vocab_size}, the vocab_size of the model"
                )


_MIXERS = {"mamba": MambaMixer, "h3": H3Mixer, "ungated": UngatedMixer}


def _check_lengths(lengths: Tensor | None, tokens: Tensor) -> None:
    if lengths is None:
        return
    if lengths.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"lengths: got dtype {lengths.dtype}, wanted int32 or int64")
    if lengths.shape != tokens.shape[:1]:
        got, wanted = tuple(lengths.shape), tuple(tokens.shape[:1])
        raise ShapeError(f"lengths: got shape {got}, wanted {wanted}, one for each row of tokens")
    if lengths.device.type == "cpu" and lengths.numel():
        low, high = (int(length) for length in lengths.aminmax())
        if low < 1 or high > tokens.shape[1]:
            raise ArgumentError(
                f"lengths: got {low} to {high}, wanted 1 to {tokens.shape[1]}, the tokens of a row"
            )


def _make_block(config: MambaConfig) -> Block:
    mixer = _MIXERS[config.block](
        config.d_model,
        d_state=config.d_state,
        d_conv=config.d_conv,
        expand=config.expand,
        dt_rank=config.dt_rank,
        dt_min=config.dt_min,
        dt_max=config.dt_max,
        dt_init=config.dt_init,
        dt_scale=config.dt_scale,
        dt_init_floor=config.dt_init_floor,
        conv_bias=config.conv_bias,
        bias=config.bias,
        selective=config.selective,
        A_init=config.A_init,
        norm_epsilon=config.mixer_norm_epsilon,
    )
    return Block(RMSNorm(config.d_model, config.norm_epsilon), mixer, config.residual_in_fp32)
