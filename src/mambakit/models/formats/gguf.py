"""The format of llama.cpp: one file with the sizes, the vocabulary and the tensors. Written, not read.

It holds A instead of A_log. Matrices keep their dtype, all else is float32.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambakit.errors import MambakitError
from mambakit.files import atomic_write
from mambakit.models.config import MambaConfig
from mambakit.models.formats.gguf_vocabulary import add_vocabulary
from mambakit.models.formats.layout import (
    REAL_AND_SELECTIVE,
    SavedTokenizer,
    require_fields,
)

if TYPE_CHECKING:
    import gguf

NAME = "gguf"
ARCHITECTURE = "mamba"
CONTEXT_LENGTH = 2**20
"""Programs want one; a state space model has none."""
PARTS = {
    "backbone.embedding.": "token_embd.",
    "backbone.norm_f.": "output_norm.",
    "backbone.layers.": "blk.",
    "lm_head.": "output.",
    ".norm.": ".attn_norm.",
    ".mixer.in_proj.": ".ssm_in.",
    ".mixer.conv1d.": ".ssm_conv1d.",
    ".mixer.x_proj.": ".ssm_x.",
    ".mixer.dt_proj.": ".ssm_dt.",
    ".mixer.A_log": ".ssm_a",
    ".mixer.D": ".ssm_d",
    ".mixer.out_proj.": ".ssm_out.",
}
"""Parts of our tensors' names, and what they are there."""
ONLY = {**REAL_AND_SELECTIVE, "expand": 2, "bias": False, "conv_bias": True}
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_gguf(
    weights: dict[str, Tensor], config: MambaConfig, path: Path, tokenizer: SavedTokenizer | None
) -> None:
    """Write a model as a GGUF file, whole or not at all.

    Args:
        weights: The state dict of a model.
        config: Its config.
        path: File to write.
        tokenizer: Goes into the file. Default: none; then a program can give and take ids alone.

    Raises:
        ConfigError: llama.cpp has no model, or no tokenizer, like this one.
        MambakitError: The package gguf is not installed, or the file cannot be written.
    """
    require_fields(config, ONLY, NAME)
    if config.mixer_norm_epsilon not in (None, config.norm_epsilon):
        warnings.warn(
            f"llama.cpp takes norm_epsilon = {config.norm_epsilon} for the norms of dt, B and C too, "
            f"in place of {config.mixer_norm_epsilon}; its results will differ a little",
            stacklevel=3,
        )
    gguf = _package()
    with atomic_write(path) as partial:
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        try:
            matrices = weights["backbone.embedding.weight"].dtype
            _add_sizes(writer, config, matrices)
            add_vocabulary(writer, tokenizer, config.padded_vocab_size)
            for name, tensor in weights.items():
                if name != "lm_head.weight" or not config.tie_embeddings:
                    _add_tensor(writer, name, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MambakitError(
            "the format 'gguf' needs the package gguf; pip install mambakit[gguf]"
        ) from error
    return gguf


def _add_sizes(writer: gguf.GGUFWriter, config: MambaConfig, matrices: torch.dtype) -> None:
    import gguf

    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)  # There is none, and no head, but llama.cpp asks for both.
    writer.add_head_count(0)
    writer.add_block_count(config.n_layer)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.d_state)
    writer.add_ssm_time_step_rank(config.resolved_dt_rank)
    writer.add_ssm_dt_b_c_rms(config.mixer_norm_epsilon is not None)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    kind = "ALL_F32" if matrices == torch.float32 else f"MOSTLY_{_TYPES[matrices]}"
    writer.add_file_type(gguf.LlamaFileType[kind])


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    import gguf

    tensor = tensor.detach().cpu()
    if name.endswith(".A_log"):
        tensor = -tensor.float().exp()
    if ".conv1d." in name:
        tensor = tensor.squeeze(1) if tensor.ndim == 3 else tensor
    if tensor.ndim == 1 or ".conv1d." in name or tensor.dtype not in _TYPES:
        tensor = tensor.float()
    tensor = tensor.contiguous()
    for ours, theirs in PARTS.items():
        name = name.replace(ours, theirs)
    # NumPy has no bfloat16, so its bytes are handed over.
    values = tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor
    kind = gguf.GGMLQuantizationType[_TYPES[tensor.dtype]]
    writer.add_tensor(name, values.numpy(), raw_dtype=kind)
