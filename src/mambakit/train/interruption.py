"""Ctrl-C and SIGTERM during training: asked once, the run stops at the next step and saves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Context in which the first SIGINT or SIGTERM is only noted; a second SIGINT acts at once.

    Outside the main thread, where Python gives no signals, it notes nothing.

    Args:
        notify: Called once, in a thread of its own, when the first signal comes.

    Attributes:
        signal: The signal that asked for the stop, or None.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self.signal: signal.Signals | None = None
        self._notify = notify
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in self._previous.items():
            signal.signal(which, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal = signal.Signals(number)
        # Not in here: what prints may be what the signal has just interrupted.
        threading.Thread(target=self._notify).start()
