from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambakit.data import prepare
from mambakit.models.config import MambaConfig
from mambakit.train.config import TrainConfig

TEXT = "".join(f"line {n}: {n * n} is the square of {n}\n" for n in range(400))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    prepare(folder / "text.txt", folder / "tokens", valid_fraction=0.1)
    return folder / "tokens"


@pytest.fixture
def make_config(corpus: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A run of a second; keywords change it."""

    def make(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "data": corpus,
            "out": tmp_path / "run",
            "model": MambaConfig(d_model=16, n_layer=2, vocab_size=257),
            "steps": 6,
            "batch_size": 2,
            "seqlen": 32,
            "lr": 3e-3,
            "device": "cpu",
            "log_every": 2,
            "valid_every": 3,
            "valid_tokens": 256,
            "save_every": 6,
        }
        return TrainConfig(**{**values, **changes})

    return make
