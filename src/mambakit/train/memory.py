"""Whether a model can be trained here at all, before gigabytes are asked for."""

from __future__ import annotations

import os

import torch

from mambakit.errors import ConfigError
from mambakit.train.config import TrainConfig

BYTES_PER_PARAMETER = 16
"""Weight, gradient and AdamW's two running means, float32."""
BYTES_PER_FROZEN_PARAMETER = 4
"""The weight alone."""


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a device; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def check_fits(config: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError if weights and optimizer alone need more than all memory of the device."""
    model = config.model
    each = BYTES_PER_FROZEN_PARAMETER if config.lora else BYTES_PER_PARAMETER
    memory, needed = device_memory(device), model.num_parameters() * each
    if memory is not None and needed > memory:
        raise ConfigError(
            f"model config: n_layer={model.n_layer} and d_model={model.d_model} take "
            f"{needed / 2**30:,.0f} GiB to train, but {device} has {memory / 2**30:,.0f} GiB; "
            "choose a smaller model"
        )
