"""One process or many: what `torchrun` says about them, and the few sums they share."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mambakit.errors import BackendError


@dataclass(frozen=True)
class World:
    """The place of this process among those that train together; alone without `torchrun`."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> World:
        """Join the processes that `torchrun` started, if any: NCCL on GPUs, Gloo on CPUs.

        Args:
            device: "auto" (the GPU if there is one), "cpu", "cuda" (the GPU of this process's
                local rank) or "cuda:N".

        Raises:
            BackendError: There is no such device on this machine.
        """
        rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        size = int(os.environ.get("WORLD_SIZE", "1"))
        place = find_device(device, local_rank)
        if size > 1 and not dist.is_initialized():
            if place.type == "cuda":
                torch.cuda.set_device(place)
            dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        return cls(rank, size, place)

    def leave(self) -> None:
        """Part from the other processes."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the progress."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, elementwise; every process must call it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, mine: bool) -> bool:
        """Whether it is true in any process; every process must call it."""
        if self.size == 1:
            return mine
        return self.sum(torch.tensor(float(mine), device=self.device)).item() > 0

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a name means on this machine; see `World.join`.

    Raises:
        BackendError: There is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise BackendError(f"device is {name!r}, not auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise BackendError(
            f"device is {name!r}, but PyTorch finds {torch.cuda.device_count()} GPUs here; "
            "use device='cpu', or see `mambakit doctor`"
        )
    return torch.device("cuda", index)
