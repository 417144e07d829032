"""`mamba_ssm.models.mixer_seq_simple`: the language model with the authors' constructors and names."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mambakit.compat.mamba_ssm.models.config_mamba import MambaConfig
from mambakit.compat.mamba_ssm.models.decoder import Decoder, is_plain
from mambakit.compat.mamba_ssm.modules.block import Block, add_norm
from mambakit.compat.mamba_ssm.modules.mamba_simple import Mamba
from mambakit.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm
from mambakit.compat.mamba_ssm.utils.generation import GenerationMixin, InferenceParams
from mambakit.compat.mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from mambakit.errors import CheckpointError, ConfigError
from mambakit.files import atomic_write
from mambakit.models.formats.layout import CONFIG_FILE, PICKLE
from mambakit.models.weights import write_tensors


class CausalLMOutput(NamedTuple):
    """What a forward of the language model returns: logits, (B, L, V)."""

    logits: Tensor


def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """Make a block with a Mamba-1 mixer.

    Args:
        d_model: M.
        d_intermediate: Width of an MLP; only 0, none, is here.
        ssm_cfg: Arguments of `Mamba`; its "layer" must be "Mamba1".
        attn_layer_idx: Layers with attention instead; this must not be one.
        attn_cfg: Without effect.
        norm_epsilon: Of the norm.
        rms_norm: RMS norm; layer norm if not.
        residual_in_fp32: As in `Block`.
        fused_add_norm: As in `Block`.
        layer_idx: Number of the layer.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ConfigError: Attention, an MLP or another mixer is asked for.
    """
    mixer = {"layer": "Mamba1", **copy.deepcopy(ssm_cfg or {})}
    wanted = {
        "d_intermediate": (d_intermediate, 0),
        "ssm_cfg['layer']": (mixer.pop("layer"), "Mamba1"),
    }
    wanted["layer_idx in attn_layer_idx"] = layer_idx in (attn_layer_idx or []), False
    for name, (got, only) in wanted.items():
        if got != only:
            raise ConfigError(
                f"{name}: got {got!r}, wanted {only!r}; mambakit has the Mamba-1 of mamba_ssm only"
            )
    made: Any = {"device": device, "dtype": dtype}
    block = Block(
        d_model,
        partial(Mamba, layer_idx=layer_idx, **mixer, **made),
        nn.Identity,
        norm_cls=partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **made),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


class MixerModel(nn.Module):
    """Embedding, blocks and final norm; the arguments are those of `create_block`.

    Args:
        d_model: M.
        n_layer: Number of blocks.
        d_intermediate: Only 0.
        vocab_size: Rows of the embedding (V).
        ssm_cfg: Arguments of `Mamba`.
        attn_layer_idx: Only none.
        attn_cfg: Without effect.
        norm_epsilon: Of all norms.
        rms_norm: RMS norm; layer norm if not.
        initializer_cfg: Arguments of `_init_weights`.
        fused_add_norm: As in `Block`.
        residual_in_fp32: As in `Block`.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: Any = {"device": device, "dtype": dtype}
        self.fused_add_norm, self.residual_in_fp32 = fused_add_norm, residual_in_fp32
        self.embedding = nn.Embedding(vocab_size, d_model, **made)
        common = d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm
        switches = residual_in_fp32, fused_add_norm
        self.layers = nn.ModuleList(
            create_block(d_model, *common, *switches, layer, device, dtype)
            for layer in range(n_layer)
        )
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **made)
        self.apply(partial(_init_weights, n_layer=n_layer, **(initializer_cfg or {})))

    def forward(
        self,
        input_ids: Tensor,
        inference_params: InferenceParams | None = None,
        **mixer_kwargs: Any,
    ) -> Tensor:
        """Token ids (B, L) to hidden vectors (B, L, M)."""
        hidden: Tensor = self.embedding(input_ids)
        residual: Tensor | None = None
        for layer in self.layers:
            hidden, residual = layer(
                hidden, residual, inference_params=inference_params, **mixer_kwargs
            )
        return add_norm(self.norm_f, hidden, residual, self.residual_in_fp32)[0]

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of all layers, by number: `InferenceParams.key_value_memory_dict`."""
        blocks: Any = self.layers
        size = batch_size, max_seqlen, dtype
        return {
            i: block.allocate_inference_cache(*size, **kwargs) for i, block in enumerate(blocks)
        }


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """The language model. State-dict names are those of official checkpoints, and of ours.

    Args:
        config: Sizes and switches.
        initializer_cfg: Arguments of `_init_weights`.
        device: Of the parameters.
        dtype: Of the parameters that may be narrow; see `Mamba`.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        rows = -(-config.vocab_size // multiple) * multiple
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=rows,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, rows, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the weight of the embedding, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of all layers, by number."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Logits of the token after each position.

        Args:
            input_ids: (B, L).
            position_ids: Without effect.
            inference_params: Where states are kept; with a `seqlen_offset` of 0 they start afresh.
            num_last_tokens: For how many of the last positions; 0 is all.
            mixer_kwargs: For the mixers: `seq_idx`.
        """
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(self.lm_head(hidden[:, -num_last_tokens:]))

    def decoder(self) -> Decoder | None:
        """What `decode` calls instead of the model: the same weights with fused steps, if it is plain."""
        is_whole = type(self) is MambaLMHeadModel and type(self.backbone) is MixerModel
        return Decoder(self) if is_whole and is_plain(self) else None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """Read a checkpoint of the authors, of transformers' `mamba` or of mambakit.

        Args:
            pretrained_model_name: Folder or hub id.
            device: Where the weights go. Default: the CPU.
            dtype: Of the weights. Default: float32.
            kwargs: Further arguments of the constructor.

        Raises:
            CheckpointError: There is no checkpoint, or its tensors do not fit its config.
        """
        fields = load_config_hf(pretrained_model_name)
        known = {field.name for field in dataclasses.fields(MambaConfig)}
        if unknown := [*fields.keys() - known]:
            raise CheckpointError(
                f"{pretrained_model_name}: config.json has the unknown {', '.join(sorted(unknown))}; "
                "give a checkpoint of Mamba-1"
            )
        dtype = dtype or torch.get_default_dtype()
        model = cls(MambaConfig(**fields), device="meta", dtype=dtype, **kwargs)
        weights = load_state_dict_hf(pretrained_model_name, device)
        if model.config.tie_embeddings and "backbone.embedding.weight" in weights:
            weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        kept = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        cast = {name: tensor.to(kept.get(name)) for name, tensor in weights.items()}
        try:
            model.load_state_dict(cast, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{pretrained_model_name}: {error}") from error
        model.tie_weights()
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write config.json and pytorch_model.bin, which the authors' code opens, and ours."""
        folder = Path(save_directory)
        write_tensors(self.state_dict(), folder / PICKLE)
        with atomic_write(folder / CONFIG_FILE) as path:
            fields = dataclasses.asdict(self.config)
            path.write_text(json.dumps(fields, indent=4) + "\n", encoding="utf-8")


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """The initial values that layers do not set themselves, for `nn.Module.apply`.

    Args:
        module: A layer.
        n_layer: Number of blocks.
        initializer_range: Standard deviation of the embedding.
        rescale_prenorm_residual: Whether out_proj shrinks with the number of layers, so that the
            variance of the residual stream does not grow.
        n_residuals_per_layer: How many sums a block makes.
    """
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    is_kept = getattr(getattr(module, "bias", None), "_no_reinit", False)
    if isinstance(module, nn.Linear) and module.bias is not None and not is_kept:
        nn.init.zeros_(module.bias)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters(recurse=True):
            if name in ("out_proj.weight", "fc2.weight"):
                # From the start, since `apply` on a model of models comes by twice.
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))
