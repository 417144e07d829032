"""Memory for the gradients of two halves of a tensor, side by side, so that one matrix product takes both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class GradientRoom:
    """Where a node of autograd wants the gradients of its two outputs, as its attribute `room`.

    Nodes that make these gradients ask for memory with `room_for`. None of them has to, and what has been put there may
    be replaced on the way: the node that takes the gradients finds out with `joined`.

    Example:
        >>> import torch
        >>> room, output = GradientRoom(), torch.empty(3)
        >>> halves = [room.half(index, output).fill_(index) for index in (0, 1)]
        >>> room.joined(halves)
        (tensor([0., 0., 0., 1., 1., 1.]),)
    """

    def __init__(self) -> None:
        self._both: Tensor | None = None
        self._free: set[int] = set()

    def half(self, index: int, output: Tensor) -> Tensor:
        """Memory for the gradient of output `index`, (..., D), like it; never given out before."""
        if index not in self._free:
            self._both, self._free = (
                output.new_empty(*output.shape[:-1], 2, output.shape[-1]),
                {0, 1},
            )
        assert self._both is not None
        self._free.remove(index)
        return self._both[..., index, :]

    def joined(self, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Both gradients as one, (..., 2 D), if they are where they were wanted; else as they are."""
        both, self._both, self._free = self._both, None, set()
        if both is not None and all(map(_is_same, gradients, both.unbind(-2))):
            return (both.flatten(-2),)
        return tuple(gradients)


def room_for(ctx: Any, inputs: Sequence[Any], place: int) -> Tensor | None:
    """Memory for the gradient of an input, if the node that takes it has a wish.

    Args:
        ctx: Node of autograd, in its backward pass.
        inputs: Of the node, up to this one at least.
        place: Of this input, which may be absent (None).
    """
    # A pass that records, or that a mode observes, is to see outputs which are new.
    is_observed = torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() > 0
    if is_observed or inputs[place] is None:
        return None
    node, index = ctx.next_functions[sum(isinstance(x, Tensor) for x in inputs[:place])]
    room = getattr(node, "room", None)
    return room.half(index, inputs[place]) if isinstance(room, GradientRoom) else None


def _is_same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (
        b.data_ptr(),
        b.shape,
        b.stride(),
        b.dtype,
    )
