"""Models to folders and back, in every format that is known; the formats are in `mambakit.models.formats`.

The config is written last, so a folder that has one is complete. A tokenizer may lie beside them as
tokenizer.json.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.errors import ArgumentError, CheckpointError, ConfigError
from mambakit.files import atomic_write
from mambakit.models.adapter import Adapter, base_of, has_adapters, is_adapter
from mambakit.models.config import MambaConfig
from mambakit.models.fit import check_fit, joined, tied_head
from mambakit.models.formats import huggingface, mambakit, official
from mambakit.models.formats.gguf import NAME as GGUF
from mambakit.models.formats.gguf import write_gguf
from mambakit.models.formats.layout import CONFIG_FILE, Layout, SavedTokenizer
from mambakit.models.hub import locate
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.quantisation import Quantisation, quantise
from mambakit.models.weights import read_tensors, weight_files, write_tensors
from mambakit.nn.quantised_linear import QuantisedEmbedding

LAYOUTS = {layout.name: layout for layout in (mambakit.LAYOUT, official.LAYOUT, huggingface.LAYOUT)}
FORMATS = (*LAYOUTS, GGUF)
"""Names of all formats that `save_model` writes; all but GGUF are read."""


def save_model(
    model: MambaLanguageModel,
    folder: str | os.PathLike[str],
    format: str = mambakit.NAME,
    tokenizer: SavedTokenizer | None = None,
) -> None:
    """Write weights and config; an existing checkpoint in the folder is replaced, file by file.

    Each file is written beside and renamed, the config last. A tied head is not stored, except in
    the format "official". "gguf" writes one file, model.gguf, with all in it.

    Args:
        model: The model.
        folder: Where to; it is made if it is not there.
        format: "mambakit", "official" (`mamba_ssm`), "huggingface" (transformers) or "gguf"
            (llama.cpp).
        tokenizer: Saved beside the weights; in a GGUF, within it. Default: none.

    Raises:
        ArgumentError: There is no such format, the model is quantised and it is not "mambakit", or
            the model has adapters.
        ConfigError: The format has no model like this one.
        MambakitError: The folder cannot be written, or the disk is full.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise ArgumentError(f"format: got {format!r}, wanted one of {', '.join(FORMATS)}")
    if model.quantisation is not None and format != mambakit.NAME:
        raise ArgumentError(
            f"format: got {format!r}, but the model is quantised, wanted {mambakit.NAME!r}; "
            "save the float model it came from"
        )
    if has_adapters(model):
        raise ArgumentError(
            "model: has adapters, which no format has; save merge_and_unload() of its PeftModel, "
            "or the adapters with its save_pretrained"
        )
    if format == GGUF:
        write_gguf(model.state_dict(), model.config, folder / "model.gguf", tokenizer)
        return
    layout = LAYOUTS[format]
    eos_id = None if tokenizer is None else tokenizer.eos_id
    description = layout.describe(model.config, eos_id)
    if model.quantisation is not None:
        description = mambakit.describe_quantised(description, model.quantisation.to_dict())
    left_out = () if layout.stores_tied_head else tied_head(model)
    weights = {
        layout.theirs(name): tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name not in left_out
    }
    write_tensors(weights, folder / layout.weights)
    if tokenizer is not None:
        tokenizer.save(folder)
    with atomic_write(folder / CONFIG_FILE) as path:
        path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_model(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    revision: str | None = None,
) -> MambaLanguageModel:
    """Read a model in any of the formats but GGUF, which is recognised by its config.json.

    The weights are mapped into memory and go to their device and dtype one by one, so it takes the
    memory of the model alone. What need not be converted stays mapped: then the file must not be
    written into (to replace it is fine). A LoRA adapter of peft is merged, in float32, into the
    checkpoint that it names.

    Args:
        source: Folder of the checkpoint or adapter, or an id of the Hugging Face hub.
        device: Where the weights go.
        dtype: Cast the weights to it (what must stay float32 does, and so do codes and their
            scales). Default: as they were saved.
        revision: Branch, tag or commit on the hub. Default: the main branch.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, of a kind that is not known here,
            does not fit its config, holds code, or is from a newer version; or an adapter does not
            fit the weights that it changes.
        MambakitError: It is an adapter, and the package peft is not installed.

    Warns:
        UserWarning: Weights are NaN or infinite.
    """
    folder = locate(source, revision)
    name = os.path.abspath(folder) if folder == Path(source) else os.fspath(source)
    if is_adapter(folder):
        return _load_merged(folder, name, device, dtype)
    config, quantisation, layout = _understand(folder)
    with torch.device("meta"):
        model = MambaLanguageModel(config)
        if quantisation is not None:
            quantise(model, quantisation)
    files = weight_files(folder)
    check_fit(folder, files, model, layout)
    weights = _read(files, model, layout, torch.device(device), dtype)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    embedding: Any = model.backbone.embedding
    if isinstance(embedding, QuantisedEmbedding):
        embedding.dtype = model.backbone.norm_f.weight.dtype
    model.name_or_path = name
    return model


def _load_merged(
    folder: Path, name: str, device: torch.device | str, dtype: torch.dtype | None
) -> MambaLanguageModel:
    """The model that an adapter changes, with it."""
    base = base_of(folder)
    try:
        model = load_model(base, device)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is an adapter of {base}, which cannot be opened: {error}"
        ) from error
    dtype = dtype or model.backbone.norm_f.weight.dtype
    Adapter.open(model.float(), folder).merge()
    model.name_or_path = name
    return model.to(dtype)


def base_folder(folder: Path) -> Path:
    """The folder of a checkpoint's whole weights: its own; of an adapter, that of the model it changes."""
    return base_folder(locate(base_of(folder))) if is_adapter(folder) else folder


def read_config(folder: str | os.PathLike[str]) -> MambaConfig:
    """Read the config of a checkpoint.

    Raises:
        CheckpointError: There is none, or it cannot be read or understood.
    """
    return _understand(Path(folder))[0]


def read_quantisation(folder: str | os.PathLike[str]) -> Quantisation | None:
    """How the weights of a checkpoint are quantised; None if they are floats.

    Raises:
        CheckpointError: As `read_config`.
    """
    return _understand(Path(folder))[1]


def _understand(folder: Path) -> tuple[MambaConfig, Quantisation | None, Layout]:
    """The config of a checkpoint, how it is quantised, and its format."""
    path = base_folder(folder) / CONFIG_FILE
    description = read_description(path)
    layout = next((it for it in LAYOUTS.values() if it.recognises(description)), None)
    if layout is None:
        kind = description.get("model_type") or description.get("format")
        raise CheckpointError(
            f"{path} is of another program{f' ({kind})' if kind else ''}; give a checkpoint of "
            "mambakit, mamba_ssm, or transformers' mamba or falcon_mamba"
        )
    try:
        config = layout.read(description)
        fields = mambakit.read_quantisation(description) if layout is mambakit.LAYOUT else None
        return config, None if fields is None else Quantisation.from_dict(fields), layout
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_description(path: Path) -> dict[str, Any]:
    """What a config.json says, in whichever format.

    Raises:
        CheckpointError: There is none, or it is no JSON object.
    """
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path.parent} is not a checkpoint: it has no {CONFIG_FILE}; name a folder that has one"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; restore it from a backup"
        ) from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} is of another program: it is no JSON object")
    return description


def _read(
    files: list[Path],
    model: MambaLanguageModel,
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The weights by our names, on their device and in their dtype."""
    # What a half-precision model keeps in float32. The model has no values yet, so it may change.
    narrowed = model.to(torch.bfloat16).state_dict()
    wide = {name for name, tensor in narrowed.items() if tensor.dtype == torch.float32}
    codes_and_scales = {name for name, _ in model.named_buffers()}
    tied = tied_head(model)

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype | None:
        ours = layout.ours(name)
        if ours in tied:
            return None
        if ours in codes_and_scales:
            return tensor.dtype
        target = tensor.dtype if dtype is None else dtype
        return torch.float32 if ours in wide and target.itemsize < 4 else target

    found = dict[str, Tensor]()
    for file in files:
        found |= read_tensors(file, device, dtype_of)
    if not_finite := [name for name, tensor in found.items() if not _is_finite(tensor)]:
        warnings.warn(
            f"{files[0].parent}: NaN or infinite numbers in {joined(not_finite)}; "
            "use an earlier checkpoint",
            stacklevel=3,
        )
    weights = {layout.ours(name): tensor for name, tensor in found.items()}
    return weights | {head: weights[name] for head, name in tied.items()}


def _is_finite(tensor: Tensor) -> bool:
    # Both are NaN if one number is; torch.isfinite would need as much memory again.
    low, high = tensor.detach().aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
