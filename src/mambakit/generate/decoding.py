"""One token more for every sequence of a batch, on the device alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.generate.graphs import beside, capture
from mambakit.generate.sampling import Method, sample
from mambakit.generate.slots import Slots
from mambakit.models.fused_step import gives_same_bits, settler, should_defer
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.state import ModelState


class Chosen(NamedTuple):
    """What a step gives: tokens, (B,), as `sample` returns them, and the logits, (B, V)."""

    tokens: Tensor
    logits: Tensor


class Step(NamedTuple):
    """A step of the model of so many rows, and whether it defers states."""

    run: Callable[[Tensor], Tensor]
    defers: bool


class Decoder:
    """Steps through a model and samples; what is chosen is read by the next step where it lies.

    On a GPU a step is one CUDA graph, captured in advance for batches of 1, 2, 4, ... sequences and
    each `Method`. A batch in between takes the next larger graph, which works on free rows as well.
    Where it is faster, a step writes half of the states (`DeferredStates`).

    Args:
        model: The model.
        size: Most sequences at once.
        graphs: Whether to capture CUDA graphs.
        batch_invariant: Whether a sequence gets the same bits whatever else is in the batch, on a GPU
            too. Then batches of which it would get others are steps of more rows.

    Attributes:
        slots: The sequences.
    """

    def __init__(
        self,
        model: MambaLanguageModel,
        size: int,
        graphs: bool,
        batch_invariant: bool = False,
    ) -> None:
        self.slots = Slots(model, size)
        self._model = model
        self._vocab_size = model.config.vocab_size
        self._steps: dict[int, Step] = {}
        self._settlers: dict[int, Callable[[], None]] = {}
        self._is_behind = False  # Whether states may have been deferred.
        self._buckets = buckets(size)
        if batch_invariant:
            self._buckets = same_bits(model, self.slots.state(size), self._buckets)
        self._fills_up = batch_invariant
        self._graphs: dict[tuple[int, Method], tuple[torch.cuda.CUDAGraph, Chosen]] = {}
        if graphs:
            self._capture()

    def first(self, row: int, logits: Tensor, method: Method) -> Chosen:
        """Choose the first token of a sequence from the logits after its prompt, (1, V padded)."""
        return self._choose(row, row + 1, logits, method)

    def step(self, method: Method) -> Chosen:
        """Continue all sequences; the method is the most that any of them needs."""
        count = self.slots.taken
        rows = count
        if self._graphs or self._fills_up:
            rows = next(size for size in self._buckets if size >= count)
        self._settle(before=self._prepared(rows))
        if self._graphs:
            graph, chosen = self._graphs[rows, method]
            graph.replay()
        else:
            chosen = self._step(rows, method)
        return Chosen(chosen.tokens[:count], chosen.logits[:count])

    @torch.no_grad()
    def _step(self, count: int, method: Method) -> Chosen:
        logits = self._prepared(count).run(self.slots.tokens[:count])
        return self._choose(0, count, logits, method)

    def _prepared(self, count: int) -> Step:
        if count not in self._steps:
            state = self.slots.state(count)
            defers = should_defer(self._model, state)
            deferred = None
            if defers:
                deferred = self.slots.states.defer().view(count)
                # Compiles its kernel now, not when it is needed.
                settler(self._model, state, deferred)()
            self._steps[count] = Step(self._model.prepared_step(state, deferred), defers)
        return self._steps[count]

    def _settle(self, before: Step) -> None:
        """Write what has been deferred, before a step that does not know of it."""
        if self._is_behind and not before.defers:
            count = self.slots.taken
            if count not in self._settlers:
                deferred = self.slots.states.defer().view(count)
                self._settlers[count] = settler(self._model, self.slots.state(count), deferred)
            self._settlers[count]()
        self._is_behind = before.defers

    @torch.no_grad()
    def _choose(self, first: int, last: int, logits: Tensor, method: Method) -> Chosen:
        logits = logits[:, : self._vocab_size]
        rows, seen = self.slots.sampling.slice(first, last), self.slots.seen[first:last]
        tokens = sample(logits, rows, method, seen)
        following = torch.clamp(tokens, min=0, out=self.slots.tokens[first:last])
        if method is not Method.GREEDY:  # Else nobody asks for random numbers or for what was seen.
            rows.integers[:, 2] += 1
            seen.scatter_(1, following[:, None], True)
        return Chosen(tokens, logits)

    def _capture(self) -> None:
        """Record all graphs, the largest first: what it needs of memory serves the others too."""
        pool = torch.cuda.graph_pool_handle()
        with beside():
            for bucket in reversed(self._buckets):
                for method in reversed(Method):
                    step = partial(self._step, bucket, method)
                    self._graphs[bucket, method] = capture(step, pool)


def buckets(size: int) -> list[int]:
    """Sizes of batch that graphs are captured for: powers of two, and `size` itself.

    Example:
        >>> buckets(6)
        [1, 2, 4, 6]
    """
    return [*(2**power for power in range((size - 1).bit_length())), size]


def same_bits(model: MambaLanguageModel, state: ModelState, sizes: list[int]) -> list[int]:
    """Those sizes of a batch with which a sequence gets the same bits as with the last.

    On a GPU one row is not among them: its cumulative sums, which sampling takes, go in another order.
    """
    fewest = 1 if state.layers[0].ssm_state.device.type == "cpu" else 2
    return [
        size
        for size in sizes
        if size == sizes[-1] or (size >= fewest and gives_same_bits(model, state, size, sizes[-1]))
    ]
