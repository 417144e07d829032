"""A training step as one CUDA graph, so that the GPU never waits for Python."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

EAGER_STEPS = 3
"""Steps before the capture: they compile kernels and make the optimizer's state and the libraries' workspaces."""


class StepGraph:
    """Calls a function of GPU tensors, from its fourth call on by replaying one CUDA graph.

    The graph does again what the function did, with the same memory: its inputs are copied to where they were, and its
    output is overwritten by the next call.

    Args:
        step: Called with tensors of the same shapes every time; reads no value on the host, and changes nothing there
            that matters later. Gradients that it leaves in `.grad` belong to the graph.

    Example:
        >>> import torch
        >>> step = StepGraph(lambda x: 2 * x)  # doctest: +SKIP
        >>> [step(torch.tensor(i, device="cuda")).item() for i in range(5)]  # doctest: +SKIP
        [0, 2, 4, 6, 8]
    """

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._step = step
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        self._inputs: list[Tensor | None] = []
        self._output = torch.empty(0)

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """Run the step; None stands for an input that is never there."""
        # All on one stream, also before the capture: autograd remembers on which stream a weight was used.
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if self._calls < EAGER_STEPS:
                self._output = self._step(*inputs)
            else:
                self._replay(inputs)
        current.wait_stream(self._stream)
        self._calls += 1
        return self._output

    def _replay(self, inputs: tuple[Tensor | None, ...]) -> None:
        if self._graph is None:
            self._inputs = [None if new is None else new.clone() for new in inputs]
            graph = torch.cuda.CUDAGraph()
            gc.collect()  # A graph of another StepGraph that is garbage would break the capture if it went during it.
            with torch.cuda.graph(graph, stream=self._stream):
                self._output = self._step(*self._inputs)
            self._graph = graph
        else:
            for old, new in zip(self._inputs, inputs, strict=True):
                if old is not None and new is not None:
                    old.copy_(new, non_blocking=True)
        self._graph.replay()
