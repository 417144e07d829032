"""A `MambaLMHeadModel` of plain parts, read by our own language model on the same weights, whose steps are fused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mambakit.compat.mamba_ssm.modules.block import Block
from mambakit.compat.mamba_ssm.modules.mamba_simple import Mamba
from mambakit.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm
from mambakit.compat.mamba_ssm.utils.inference_params import InferenceParams
from mambakit.models.config import MambaConfig
from mambakit.models.formats import official
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.state import ModelState
from mambakit.nn.conv import CausalConv1d
from mambakit.nn.linear import DtProjection, Linear

if TYPE_CHECKING:
    from mambakit.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

PLAIN = (
    Block, Mamba, RMSNorm, CausalConv1d, DtProjection, Linear, nn.Linear, nn.Embedding, nn.ModuleList,
    nn.SiLU,
)  # fmt: skip
"""Types of modules, of which our model has each as well."""


class Output(NamedTuple):
    """Logits, (B, 1, V)."""

    logits: Tensor


class Decoder:
    """Called by `decode` as the model itself would be; its states are a `ModelState` under the number 0.

    Args:
        model: What `is_plain` says is plain. Its weights are shared, not copied.
    """

    def __init__(self, model: MambaLMHeadModel) -> None:
        rows = model.lm_head.out_features
        # Ids in the padding of the vocabulary are allowed there.
        fields = {
            **dataclasses.asdict(model.config),
            "vocab_size": rows,
            "pad_vocab_size_multiple": 1,
        }
        config: MambaConfig = official.LAYOUT.read(fields)
        with torch.device("meta"):
            self._model = MambaLanguageModel(config)
        self._model.load_state_dict(model.state_dict(), assign=True)
        self._model.tie_weights()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights."""
        return self._model.parameters()

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> dict[int, ModelState]:
        """The states before any token."""
        return {0: self._model.initial_state(batch_size)}

    def __call__(
        self,
        tokens: Tensor,
        *,
        inference_params: InferenceParams,
        num_last_tokens: int,
        seq_idx: Tensor | None = None,
    ) -> Output:
        """Logits after tokens, (B, L); with L = 1 after others by a fused step."""
        assert num_last_tokens == 1
        states: dict[int, Any] = inference_params.key_value_memory_dict
        if 0 not in states:
            states |= self.allocate_inference_cache(tokens.shape[0], 0)
        state: ModelState = states[0]
        if inference_params.seqlen_offset > 0 and tokens.shape[1] == 1:
            return Output(self._model.step(tokens[:, 0], state)[:, None])
        old = None if inference_params.seqlen_offset == 0 else state
        hidden, new = self._model.hidden(tokens, old, seq_idx=seq_idx)
        for layer, found in zip(state.layers, new.layers, strict=True):
            # In place: a CUDA graph of the step knows these tensors.
            layer.conv_state.copy_(found.conv_state)
            layer.ssm_state.copy_(found.ssm_state)
        return Output(self._model.lm_head(hidden[:, -1:]))


def is_plain(model: MambaLMHeadModel) -> bool:
    """Whether nothing is in the model that its config does not say, and our own model has it all."""
    if not model.config.rms_norm:
        return False
    inner = [m for m in model.modules() if m is not model and m is not model.backbone]
    return all(type(m) in PLAIN for m in inner) and not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )
