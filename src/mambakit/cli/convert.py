"""`mambakit convert`: a checkpoint from one format to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mambakit.cli.parsing import parse
from mambakit.files import check_new_folder


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint in another format, with its tokenizer.

    Example: mambakit convert state-spaces/mamba-130m --tokenizer EleutherAI/gpt-neox-20b --out 130m
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Checkpoint of mambakit, mamba_ssm or transformers, run folder, or Hugging Face hub id."""
    out: Path
    """Folder to make."""
    format: Literal["mambakit", "official", "huggingface", "gguf"] = "mambakit"
    """mambakit, official (mamba_ssm), huggingface (transformers) or gguf (llama.cpp)."""
    tokenizer: str | None = None
    """bytes, a tokenizer.json, a folder that holds one, or a hub id; default: the checkpoint's."""
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; default: as they are. The recurrence stays float32."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""


def run(args: Sequence[str]) -> int:
    """Run `mambakit convert`."""
    options = parse(Convert, args, "convert")
    check_new_folder(options.out)

    import torch

    from mambakit.cli.loading import find_checkpoint, find_tokenizer, leave_out_padding
    from mambakit.models.checkpoint import load_model

    folder = find_checkpoint(options.source, options.revision)
    tokenizer = find_tokenizer(folder, options.tokenizer)
    dtype = None if options.precision is None else getattr(torch, options.precision)
    model = load_model(folder, dtype=dtype)
    if tokenizer is not None:
        leave_out_padding(model, tokenizer)
    model.save_pretrained(options.out, options.format, tokenizer)
    precision = (
        str(model.backbone.norm_f.weight.dtype).removeprefix("torch.")
        if model.quantisation is None
        else f"{model.quantisation.bits} bits"
    )
    print(
        f"{model.config.num_parameters():,} parameters in {precision}, "
        f"{'with' if tokenizer else 'without a'} tokenizer, format {options.format}, in {options.out}"
    )
    return 0
