"""Batches of token windows: shuffled and endless for training, in order for evaluation.

Which windows are in a training batch is a pure function of (seed, number of the batch), so a
loader needs no worker processes, keeps no shuffled list, and resumes anywhere at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mambakit.data.dataset import TokenDataset
from mambakit.data.packing import document_numbers
from mambakit.data.permutation import permuted
from mambakit.errors import ArgumentError, CheckpointError, DataError


@dataclass(frozen=True)
class Batch:
    """Windows of a token stream.

    Attributes:
        tokens: (B, L) int64 inputs.
        targets: (B, L) int64, the token that follows each input.
        seq_idx: (B, L) int32 document numbers, counted from 0 in each row; None if documents are
            read as one stream.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    seq_idx: torch.Tensor | None

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """tokens, targets and seq_idx."""
        return self.tokens, self.targets, self.seq_idx

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device, without waiting for it."""

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            # A copy from memory that is not pinned waits for what the GPU has yet to do.
            if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        seq_idx = None if self.seq_idx is None else copy(self.seq_idx)
        return Batch(copy(self.tokens), copy(self.targets), seq_idx)


class Loader(Iterator[Batch]):
    """Endless shuffled batches of one rank.

    An epoch is every window once, in an order of its own, with the window borders moved by an
    offset of its own. A step takes world_size * batch_size windows, each rank its part; a step
    that ends an epoch takes its other windows from the next.

    Args:
        dataset: Tokens to read.
        seqlen: Inputs per window, L.
        batch_size: Windows per batch and rank, B.
        seed: Chooses orders and offsets; at least 0.
        rank: Number of this process, 0 to world_size - 1.
        world_size: Number of processes that read together.
        documents: Give `seq_idx`, so that the state starts afresh with each document.

    Raises:
        DataError: The split is shorter than one window.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        seqlen: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        documents: bool = False,
    ) -> None:
        _check_sizes(seqlen=seqlen, batch_size=batch_size, world_size=world_size)
        if not 0 <= rank < world_size:
            raise ArgumentError(f"rank: got {rank}, wanted 0 to {world_size - 1}")
        if seed < 0:
            raise ArgumentError(f"seed: got {seed}, wanted at least 0")
        if len(dataset) < seqlen + 1:
            raise DataError(
                f"{dataset.folder}: its {dataset.split!r} split has {len(dataset):,} tokens, fewer "
                f"than one window of {seqlen:,} + 1; give more text or choose a shorter seqlen"
            )
        self.dataset = dataset
        self.seqlen = seqlen
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.documents = documents
        self.position = 0
        # One window fewer than fit leaves room for the offset.
        self.windows_per_epoch = max(1, (len(dataset) - 1) // seqlen - 1)

    @property
    def epoch(self) -> float:
        """Epochs read so far by all ranks together."""
        return self.position * self.batch_size * self.world_size / self.windows_per_epoch

    def __next__(self) -> Batch:
        starts = self._starts(self.position)
        self.position += 1
        return _batch(self.dataset, starts.tolist(), self.seqlen, self.documents)

    def _starts(self, position: int) -> npt.NDArray[np.int64]:
        """First tokens of this rank's windows in the batch of a number."""
        first = (position * self.world_size + self.rank) * self.batch_size
        numbers = np.arange(first, first + self.batch_size)
        epochs, places = np.divmod(numbers, self.windows_per_epoch)
        starts = np.empty_like(numbers)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            order = permuted(places[chosen], self.windows_per_epoch, self.seed, epoch)
            starts[chosen] = order * self.seqlen + self._offset(epoch)
        return starts

    def _offset(self, epoch: int) -> int:
        spare = len(self.dataset) - 1 - self.windows_per_epoch * self.seqlen
        # NumPy keeps this, unlike the methods of its generators, the same in every version.
        (number,) = np.random.SeedSequence((self.seed, epoch, 1)).generate_state(1, np.uint64)
        return int(number) % (spare + 1)

    def state_dict(self) -> dict[str, Any]:
        """Position, and what it is a position in; plain values for JSON. The same on every rank."""
        return {"position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            CheckpointError: It was saved with another dataset, seqlen, batch size, world size or
                seed.
        """
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise CheckpointError(
                    f"data position: was saved with {name} = {state.get(name)!r}, this run has "
                    f"{ours!r}; continue with the same value or start a new run"
                )
        self.position = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset.content,
            "seqlen": self.seqlen,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "seed": self.seed,
            "documents": self.documents,
        }


def windows(
    dataset: TokenDataset, seqlen: int, batch_size: int, *, documents: bool = False
) -> Iterator[Batch]:
    """Iterate once over a split in order: every token but the first is a target exactly once.

    The last batches are smaller: fewer rows, then one row that is shorter than `seqlen`.

    Raises:
        DataError: The split has fewer than two tokens.
    """
    _check_sizes(seqlen=seqlen, batch_size=batch_size)
    targets = len(dataset) - 1
    if targets < 1:
        raise DataError(f"{dataset.folder}: its {dataset.split!r} split has fewer than two tokens")
    whole = targets // seqlen * seqlen
    for start in range(0, whole, batch_size * seqlen):
        stop = min(start + batch_size * seqlen, whole)
        yield _batch(dataset, range(start, stop, seqlen), seqlen, documents)
    if whole < targets:
        yield _batch(dataset, [whole], targets - whole, documents)


def _batch(dataset: TokenDataset, starts: Sequence[int], seqlen: int, documents: bool) -> Batch:
    rows = np.empty((len(starts), seqlen + 1), np.int64)
    for row, start in zip(rows, starts, strict=True):
        row[:] = dataset.tokens[start : start + seqlen + 1]
    seq_idx = None
    if documents:
        numbers = [document_numbers(dataset.document_ends, start, seqlen) for start in starts]
        seq_idx = torch.from_numpy(np.stack(numbers))
    stream = torch.from_numpy(rows)
    return Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), seq_idx)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ArgumentError(f"{name}: got {size}, wanted at least 1")
