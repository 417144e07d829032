import os
import threading

import pytest
import torch

from mambakit.ops import rms_norm
from mambakit.ops.cpu.threads import SHARED, run, serial


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("tasks", [0, 1, 4, 17])
def test_every_task_runs_once(threads: int, tasks: int) -> None:
    done = [0] * tasks

    def kernel(first: int, last: int) -> None:
        for task in range(first, last):
            done[task] += 1

    run(kernel, tasks)
    assert done == [1] * tasks


def test_an_error_of_any_thread_is_raised(threads: int) -> None:
    def kernel(first: int, last: int) -> None:
        if last == 10:
            raise ValueError("of the last range")

    with pytest.raises(ValueError, match="of the last range"):
        run(kernel, 10)


def test_many_callers_at_once() -> None:
    x, weight = torch.randn(500, 64), torch.randn(64)
    expected = rms_norm(x, weight, backend="cpu")
    results: list[torch.Tensor] = []

    def call() -> None:
        results.extend(rms_norm(x, weight, backend="cpu") for _ in range(20))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 80
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_starts_its_own_threads() -> None:
    def nothing(first: int, last: int) -> None:
        pass

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(nothing, 4)
        child = os.fork()
        if child == 0:
            run(nothing, 4)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def test_a_serial_function_has_a_thread_that_shares_nothing(threads: int) -> None:
    @serial
    def work(x: torch.Tensor, factor: int = 1) -> tuple[torch.Tensor, int, threading.Thread]:
        return factor * x, torch.get_num_threads(), threading.current_thread()

    for _ in range(2):
        doubled, count, thread = work(torch.ones(SHARED), factor=2)
        assert doubled.sum() == 2 * SHARED
        assert count == 1
        assert thread is not threading.current_thread()
        assert torch.get_num_threads() == threads
    _, count, thread = work(torch.ones(SHARED - 1))
    assert count == threads
    assert thread is threading.current_thread()


def test_a_serial_function_leaves_new_threads_their_number(threads: int) -> None:
    serial(torch.Tensor.sum)(torch.ones(SHARED))
    counts: list[int] = []
    thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert counts == [threads]


def test_what_a_serial_function_raises_arrives() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        serial(torch.Tensor.view)(torch.ones(SHARED), 7)
