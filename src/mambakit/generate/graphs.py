"""CUDA graphs that are captured in advance."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """A stream of its own for captures, between what is launched before and after."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    gc.collect()  # A graph that is garbage would break the capture if it went during it.
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


def capture(function: Callable[[], Result], pool: Any) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record what a function launches, in a pool of memory; and what it returns, made anew by each replay."""
    function()  # What is made at first use must not be recorded.
    graph = torch.cuda.CUDAGraph()
    # Not `torch.cuda.graph`, which collects garbage each time.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        result = function()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # That the capture is broken.
            graph.capture_end()
        raise
    graph.capture_end()
    return graph, result
