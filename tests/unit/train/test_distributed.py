from __future__ import annotations

import pytest
import torch

from mambakit.errors import BackendError
from mambakit.train.distributed import World, find_device


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert find_device("cuda") == torch.device("cuda", 0)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "meta", "cpu:3", ""])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(BackendError, match="not auto, cpu, cuda or cuda:N"):
        find_device(name)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BackendError, match="'cuda:2', but PyTorch finds 2 GPUs here"):
        find_device("cuda:2")


def test_alone_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = World.join("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.sum(torch.tensor(3.0)).item() == 3.0
    assert [world.any(mine) for mine in (True, False)] == [True, False]
    world.wait()
    world.leave()
