from __future__ import annotations

import signal
import threading

import pytest

from mambakit.train.interruption import Interruption


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_told(which: signal.Signals) -> None:
    told = threading.Semaphore(0)
    before = signal.getsignal(which)
    with Interruption(told.release) as interruption:
        assert interruption.signal is None
        signal.raise_signal(which)
        signal.raise_signal(signal.SIGTERM)
        assert interruption.signal is which
    assert told.acquire(timeout=9)
    assert not told.acquire(timeout=0.05)
    assert signal.getsignal(which) is before


def test_a_second_ctrl_c_acts_at_once() -> None:
    with Interruption(lambda: None), pytest.raises(KeyboardInterrupt):  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def test_other_threads_take_no_signals() -> None:
    seen: list[signal.Signals | None] = []

    def work() -> None:
        with Interruption(lambda: None) as interruption:
            seen.append(interruption.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
