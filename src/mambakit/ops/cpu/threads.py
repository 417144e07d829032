"""Shares the tasks of a kernel among threads.

The kernels release the GIL, so plain Python threads run them in parallel. Numba's own parallel loops are not used: its
default layer aborts the process when two threads enter it, and its OpenMP layer does not survive a fork.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

import torch

_pool: ThreadPoolExecutor | None = None


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


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="mambakit")
    return _pool


def _forget() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):  # threads do not live on in a forked child
    os.register_at_fork(after_in_child=_forget)
