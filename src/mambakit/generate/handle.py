"""The client's end of a request."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

from mambakit.generate.request import Completion, Output
from mambakit.generate.task import Task


class Handle:
    """A request under way: iterate over what comes, or wait for all of it.

    Without a background thread whoever waits steps the engine, all requests with it. A handle
    that is dropped, or whose iterator is closed or dropped, cancels its request: its slot is free
    for the next step.

    Args:
        task: The engine's end.
        advance: Lets the engine go on; returns when there may be something new.

    Example:
        >>> from mambakit import MambaConfig, MambaLanguageModel
        >>> from mambakit.generate import Engine, Request
        >>> engine = Engine(MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=8)))
        >>> handle = engine.submit(Request(prompt=[1, 2, 3], max_tokens=4))
        >>> len([output.token for output in handle]), handle.result().finish_reason
        (4, 'length')
    """

    def __init__(self, task: Task, advance: Callable[[Task], Output | None]) -> None:
        self._task = task
        self._advance = advance
        self._at_end = False

    def __iter__(self) -> Iterator[Output]:
        """What comes, until the request has ended.

        Raises:
            ArgumentError: The logits are not finite. And whatever went wrong in a step.
        """
        try:
            while (output := self._next()) is not None:
                yield output
        finally:
            self.cancel()

    def result(self) -> Completion:
        """Wait until the request has ended; raises what iterating raises."""
        while self._next() is not None:
            pass
        return self._task.completion()

    def poll(self) -> list[Output]:
        """What has come and was not taken yet; does not wait. Raises what iterating raises."""
        outputs: list[Output] = []
        while not self._at_end:
            try:
                output = self._task.outputs.get_nowait()
            except queue.Empty:
                break
            self._at_end = output is None
            if output is not None:
                outputs.append(output)
        if self._at_end and not outputs:
            self._raise()
        return outputs

    def cancel(self) -> None:
        """End the request; what came so far stays. From any thread; nothing if it has ended."""
        self._task.cancelled = True

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._task.finish_reason is not None

    def _next(self) -> Output | None:
        if not self._at_end:
            output = self._advance(self._task)
            if output is not None:
                return output
            self._at_end = True
        self._raise()
        return None

    def _raise(self) -> None:
        if self._task.error is not None:
            raise self._task.error

    def __del__(self) -> None:
        self.cancel()
