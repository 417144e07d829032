"""The model that a run starts with: random weights, or those of a checkpoint, with adapters or without."""

from __future__ import annotations

from pathlib import Path

import torch

from mambakit.data.tokenizer import Tokenizer, load_tokenizer
from mambakit.errors import ConfigError
from mambakit.models.adapter import Adapter, has_adapters
from mambakit.models.checkpoint import load_model
from mambakit.models.hub import locate
from mambakit.models.language_model import MambaLanguageModel
from mambakit.train.checkpointing import find_model
from mambakit.train.config import TrainConfig


def check_config(
    config: TrainConfig, tokenizer: Tokenizer, model: MambaLanguageModel | None
) -> None:
    """Raise ConfigError unless the model that the config describes fits the tokenizer, and is the one given, if any."""
    start, vocab_size = config.init_from, tokenizer.vocab_size
    if config.model.vocab_size < vocab_size:
        remedy = (
            f"set vocab_size = {vocab_size}"
            if start is None
            else f"prepare the text with the tokenizer of {start}"
        )
        raise ConfigError(
            f"model config: vocab_size is {config.model.vocab_size}, but the tokenizer of "
            f"{config.data} has {vocab_size} ids; {remedy}"
        )
    if model is None:
        return
    if model.config != config.model:
        raise ConfigError("training config: model is not the config of the model that is given")
    if start is not None:
        raise ConfigError(
            f"training config: init_from is {start!r}, but a model is given too; give one of them"
        )
    _check_trainable(model)


def find_start(source: str) -> str:
    """What `load_model` takes for the checkpoint, run folder or hub id that a user names."""
    return str(find_model(Path(source))) if Path(source).exists() else source


def open_start(
    config: TrainConfig, tokenizer: Tokenizer, device: torch.device
) -> MambaLanguageModel:
    """The model in `config.init_from`, float32.

    Raises:
        CheckpointError: It cannot be opened.
        ConfigError: The config describes another model, or the data is of another tokenizer.
    """
    assert config.init_from is not None
    source = find_start(config.init_from)
    model = load_model(source, device, torch.float32)
    _check_trainable(model)
    wanted, found = config.model.to_dict(), model.config.to_dict()
    if different := [f"{key} = {found[key]!r}" for key in found if found[key] != wanted[key]]:
        raise ConfigError(
            f"model config: {config.init_from} has {', '.join(different)}; leave these options out, or "
            "in Python take MambaConfig.from_pretrained"
        )
    folder = locate(source)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    if has_tokenizer and load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"{config.data} was prepared with another tokenizer than {config.init_from} has; "
            f"prepare the text again with --tokenizer {folder}"
        )
    return model


def _check_trainable(model: MambaLanguageModel) -> None:
    if has_adapters(model):
        raise ConfigError(
            "training: the model has adapters already; merge them, and let the run add its own (lora = true)"
        )
    if model.quantisation is not None:
        raise ConfigError(
            f"training: the model is quantised to {model.quantisation.bits} bits, which have no "
            "gradient; train the float model it came from"
        )


def make_adapter(model: MambaLanguageModel, config: TrainConfig) -> Adapter | None:
    """Add the adapters that the config asks for, and freeze all else; None if it asks for none."""
    if not config.lora:
        return None
    return Adapter.new(
        model,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=config.lora_targets,
    )
