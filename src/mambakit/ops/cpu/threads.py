"""Shares the tasks of a kernel among threads.

The kernels release the GIL, so plain Python threads run them in parallel. Numba's own parallel loops are not used: its
default layer aborts the process when two threads enter it, and its OpenMP layer does not survive a fork.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

SHARED = 2**15
"""Numbers from which on PyTorch shares an operation among threads."""

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")

_pool: ThreadPoolExecutor | None = None
_serial: ThreadPoolExecutor | None = None


def run(kernel: Callable[..., None], tasks: int, *args: Any) -> None:
    """Call `kernel(first, last, *args)` for consecutive ranges that cover `range(tasks)`, one a thread.

    As many threads as `torch.get_num_threads()`. What a task computes must not depend on the range it is in: then the
    result is the same, bit for bit, for any number of threads.
    """
    threads = min(torch.get_num_threads(), tasks)
    bounds = [tasks * i // threads for i in range(threads + 1)] if threads else []
    rest = [_threads().submit(kernel, first, last, *args) for first, last in pairwise(bounds[1:])]
    try:
        if threads:
            kernel(bounds[0], bounds[1], *args)
    finally:
        wait(rest)  # the arrays must outlive every thread that writes to them
    for future in rest:
        future.result()


def serial(
    function: Callable[Concatenate[Tensor, _Params], _Result],
) -> Callable[Concatenate[Tensor, _Params], _Result]:
    """Let a function of a tensor of the CPU, and the operations of PyTorch in it, use one thread.

    Threads among which PyTorch has shared an operation spin for milliseconds, should there be more to do: on the
    cores that a kernel of ours needs next. It shares as many as the thread that asks has set, so one of our own asks.
    The function must change nothing in place, since what `torch.inference_mode` and the like say holds for the caller.
    """

    @functools.wraps(function)
    def call(first: Tensor, /, *args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
        if not first.is_cpu or first.numel() < SHARED:
            return function(first, *args, **kwargs)
        return _serial_thread().submit(function, first, *args, **kwargs).result()

    return call


def _serial_thread() -> ThreadPoolExecutor:
    global _serial
    if _serial is None:
        threads = torch.get_num_threads()
        _serial = ThreadPoolExecutor(1, "mambakit-serial", torch.set_num_threads, (1,))
        _serial.submit(int).result()
        torch.set_num_threads(threads)  # Of threads that are yet to come; ours keeps its own.
    return _serial


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="mambakit")
    return _pool


def _forget() -> None:
    global _pool, _serial
    _pool = _serial = None


if hasattr(os, "register_at_fork"):  # threads do not live on in a forked child
    os.register_at_fork(after_in_child=_forget)
