"""From the device to the tasks: what a step has chosen, read when it is there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambakit.generate.decoding import Chosen
from mambakit.generate.sampling import log_probabilities
from mambakit.generate.task import Task


class Delivery:
    """The tokens of a step on their way to the host.

    On a GPU they are copied while the host goes on, and `hand_out` waits for the copy alone.

    Args:
        tasks: Whose tokens they are, in the order of the rows.
        chosen: What the step gave; may be overwritten by the next one.
        step: Number of the step of the engine.
    """

    def __init__(self, tasks: Sequence[Task], chosen: Chosen, step: int) -> None:
        self.step = step
        self.tasks = list(tasks)
        self._tokens = _to_host(chosen.tokens)
        self._logs: list[tuple[Tensor, Tensor, Tensor] | None] = self._log_probabilities(chosen)
        self._copied: torch.cuda.Event | None = None
        if chosen.tokens.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def hand_out(self) -> None:
        """Give each task its token."""
        if self._copied is not None:
            self._copied.synchronize()
        for task, token, logs in zip(self.tasks, self._tokens.tolist(), self._logs, strict=True):
            if logs is None:
                task.take(token, None, ())
            else:
                chosen, values, ids = logs
                likeliest = zip(ids[0].tolist(), values[0].tolist(), strict=True)
                task.take(token, chosen.item(), tuple(likeliest))

    def _log_probabilities(self, chosen: Chosen) -> list[tuple[Tensor, Tensor, Tensor] | None]:
        """For each task that wants them, a row each so that it depends on no other."""
        logs: list[tuple[Tensor, Tensor, Tensor] | None] = []
        for row, task in enumerate(self.tasks):
            count = task.request.logprobs
            if count is None:
                logs.append(None)
                continue
            logits, tokens = chosen.logits[row : row + 1], chosen.tokens[row : row + 1]
            count = min(count, logits.shape[1])
            one, values, ids = map(_to_host, log_probabilities(logits, tokens, count))
            logs.append((one, values, ids))
        return logs


def _to_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; from a GPU it is there once the work queued so far is done."""
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
