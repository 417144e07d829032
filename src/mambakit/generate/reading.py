"""Prompts are read in chunks and in turns, from the longest beginning that is known already."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mambakit.generate.prefix_cache import PrefixCache, is_kept, prefix_keys
from mambakit.generate.task import Task
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.state import ModelState

ReadChunk = Callable[[Tensor, ModelState | None], tuple[Tensor, ModelState]]
"""From tokens, (1, L), on the CPU and the state before them to the logits after them, (1, V), and the state."""

MOST_READING = 8
"""Prompts that are read in turns. Each has a state of its own until it gets a slot."""


class Reader:
    """The requests whose prompts are not read yet, first come first served.

    Where a prompt is cut into chunks depends on nothing but its own length, so its result does not
    either.

    Args:
        read_chunk: Reads a chunk.
        chunk: Most tokens read in a step of the engine, and at once.
        cache: Where states are left and looked for. Default: none.
        mark: Fingerprint of the model, for the cache.

    Attributes:
        waiting: Requests that nothing was read of.
        reading: Requests that take turns, the next one first.
    """

    def __init__(
        self,
        read_chunk: ReadChunk,
        chunk: int,
        cache: PrefixCache | None = None,
        mark: str = "",
    ) -> None:
        self.waiting: deque[Task] = deque()
        self.reading: deque[Task] = deque()
        self._run, self._chunk = read_chunk, chunk
        self._cache, self._mark = cache, mark

    def read(self, free: int) -> Iterator[tuple[Task, Tensor]]:
        """Read on within the budget of a step.

        Args:
            free: Slots for prompts that are read.

        Yields:
            Each request whose prompt is read, and the logits after it, (1, V).
        """
        left = self._chunk
        while True:
            while self.waiting and len(self.reading) < min(free, MOST_READING):
                self.reading.append(self._begun(self.waiting.popleft()))
            if not self.reading:
                return
            size = self.reading[0].chunk(self._chunk)
            if size > left:
                return
            left -= size
            task = self.reading.popleft()
            logits = self._read_chunk(task, size)
            if task.unread:
                self.reading.append(task)
            else:
                free -= 1
                yield task, logits

    def clear(self) -> None:
        """Forget all requests."""
        self.waiting.clear()
        self.reading.clear()

    def _begun(self, task: Task) -> Task:
        """The request, after the longest beginning of its prompt that is known."""
        if self._cache is None or task.request.prefix is not None:
            return task
        task.keys = prefix_keys(self._mark, task.prompt[0], self._chunk)
        # The logits come from the last token, so that one is read in any case.
        usable = (task.unread - 1) // self._chunk
        if found := self._cache.find(task.keys[:usable]):
            index, task.state = found
            task.read = task.reused = (index + 1) * self._chunk
        return task

    def _read_chunk(self, task: Task, size: int) -> Tensor:
        tokens = task.prompt[:, task.read : task.read + size]
        logits, task.state = self._run(tokens, task.state)
        task.read += size
        index, rest = divmod(task.read, self._chunk)
        if self._cache is not None and task.keys and rest == 0 and is_kept(index, len(task.keys)):
            self._cache.keep(task.keys[index - 1], task.state)
        return logits


def chunk_reader(model: MambaLanguageModel, device: torch.device) -> ReadChunk:
    """Reads chunks with the model, operation by operation."""

    def read(tokens: Tensor, state: ModelState | None) -> tuple[Tensor, ModelState]:
        return model.prefill(on_its_way(tokens, device), state, chunk=tokens.shape[1])

    return read


def on_its_way(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on another device, without waiting for it to arrive."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
