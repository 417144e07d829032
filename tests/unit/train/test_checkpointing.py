from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mambakit.data import BytesTokenizer
from mambakit.errors import CheckpointError, MambakitError
from mambakit.models.config import MambaConfig
from mambakit.models.language_model import MambaLanguageModel
from mambakit.train import checkpointing as cp

MODEL = MambaLanguageModel(MambaConfig(d_model=16, n_layer=1, vocab_size=257))


def save(run: Path, step: int, keep: int = 2, **state: Any) -> Path:
    return cp.save_checkpoint(run, step, MODEL, BytesTokenizer(), state, keep)


def test_a_checkpoint_holds_model_tokenizer_and_state(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, loader={"position": 7})
    assert folder == tmp_path / "checkpoints" / "step-00000003"
    names = ["config.json", "model.safetensors", "tokenizer.json", "training_state.pt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert cp.load_training_state(folder) == {"version": 1, "step": 3, "loader": {"position": 7}}


def test_only_the_last_ones_are_kept_in_order_of_their_steps(tmp_path: Path) -> None:
    for step in (9, 10, 100_000_000):
        save(tmp_path, step)
    assert [p.name for p in cp.list_checkpoints(tmp_path)] == ["step-00000010", "step-100000000"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_parts_are_no_checkpoints_and_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".step-00000002.0f3a.partial", ".step-00000001.partial"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert [path.name for path in cp.list_checkpoints(tmp_path)] == ["step-00000001"]
    cp.remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_the_model_of_a_run_is_its_last_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    last = save(tmp_path, 2)
    assert cp.find_model(tmp_path) == last
    assert cp.find_model(last) == last


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_no_model_is_found(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a checkpoint .* nor a run folder"):
        cp.find_model(tmp_path / name)


def fail(*_: object) -> None:
    raise MambakitError("x cannot be written: the disk is full")


def test_a_failed_save_keeps_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, 1, keep=1)
    monkeypatch.setattr(cp, "save_model", fail)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2, keep=1)
    assert str(caught.value) == (
        "step 2 could not be saved: x cannot be written: the disk is full; "
        f"the last good checkpoint is {first}"
    )
    assert list((tmp_path / "checkpoints").iterdir()) == [first]


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def advance(path: Path) -> None:
    torch.save({"version": 2}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "is missing; remove"),
        (cut, "is damaged"),
        (empty, "is damaged"),
        (advance, "has version 2, this mambakit reads up to 1; upgrade mambakit"),
    ],
)
def test_a_state_that_cannot_be_read(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = save(tmp_path, 1, weights=torch.zeros(100))
    damage(folder / cp.STATE_FILE)
    with pytest.raises(CheckpointError, match=message):
        cp.load_training_state(folder)


def test_random_numbers_go_on(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, random=cp.random_state())
    draws = [(random.random(), np.random.rand(), torch.rand(()).item()) for _ in range(2)]
    cp.restore_random_state(cp.load_training_state(folder)["random"])
    again = [(random.random(), np.random.rand(), torch.rand(()).item()) for _ in range(2)]
    assert draws == again
    assert draws[0] != draws[1]
