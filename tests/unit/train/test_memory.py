from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mambakit.errors import ConfigError
from mambakit.models.config import MambaConfig
from mambakit.train import TrainConfig, memory

CPU = torch.device("cpu")
MODEL = MambaConfig(d_model=768, n_layer=24)
CONFIG = TrainConfig(data=Path("data"), out=Path("run"), model=MODEL)


def test_a_model_needs_sixteen_bytes_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 16 * MODEL.num_parameters()
    monkeypatch.setattr(memory, "device_memory", lambda device: needed)
    memory.check_fits(CONFIG, CPU)
    monkeypatch.setattr(memory, "device_memory", lambda device: needed - 1)
    with pytest.raises(ConfigError) as caught:
        memory.check_fits(CONFIG, CPU)
    assert str(caught.value) == (
        "model config: n_layer=24 and d_model=768 take 2 GiB to train, but cpu has 2 GiB; "
        "choose a smaller model"
    )


def test_a_frozen_model_needs_four(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, lora=True, init_from="base")
    monkeypatch.setattr(memory, "device_memory", lambda device: 4 * MODEL.num_parameters())
    memory.check_fits(config, CPU)
    monkeypatch.setattr(memory, "device_memory", lambda device: 4 * MODEL.num_parameters() - 1)
    with pytest.raises(ConfigError, match="but cpu has 0 GiB; choose a smaller model"):
        memory.check_fits(config, CPU)


def test_where_the_memory_is_unknown_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: None)
    memory.check_fits(CONFIG, CPU)


def test_this_machine_has_some_memory() -> None:
    found = memory.device_memory(CPU)
    assert found is None or 2**28 < found < 2**50
