"""Tensors that the backward pass computes again, so that the forward pass need not keep them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Recipe = Callable[..., Tensor]


class Recomputation:
    """A context in which autograd keeps recipes in place of some tensors.

    Autograd saves within it what it always saves, except the tensors that were given to
    `instead_of`. The graph is that of the forward pass; only values are computed again, once a
    backward pass, so the gradients are the same bit for bit.

    It stands back from others who decide what is kept: `torch.utils.checkpoint` and other
    saved-tensor hooks, transforms of `torch.func`, `torch.compile`.

    Args:
        wanted: Whether to do it at all.

    Example:
        >>> import torch
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> with Recomputation(wanted=True) as again:
        ...     y = -x
        ...     again.instead_of(y, torch.neg, x)
        ...     z = y * y  # needs y in the backward, but keeps x
        >>> z.backward()
        >>> x.grad
        tensor([6.])
    """

    def __init__(self, wanted: bool) -> None:
        is_on = wanted and _is_ours()
        self._hooks = saved_tensors_hooks(self._pack, _unpack) if is_on else None
        self._known: dict[int, tuple[Tensor, _Recomputed]] = {}

    def __enter__(self) -> Recomputation:
        if self._hooks:
            self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._hooks:
            self._hooks.__exit__()
        self._known.clear()
        self._hooks = None  # They know this object: a circle that only garbage collection ends.

    def instead_of(self, tensor: Tensor, recipe: Recipe, *inputs: Tensor | None) -> None:
        """Keep `recipe` and `inputs` where autograd would keep `tensor`, or a view of it.

        Args:
            tensor: Equal to recipe(*inputs), bit for bit; the whole of its memory.
            recipe: Called without gradient and without autocast.
            inputs: What it takes; they are kept.
        """
        if self._hooks:
            # With the tensor, so that its memory is nobody else's as long as it is known here.
            self._known[_memory(tensor)] = tensor, _Recomputed(tensor, recipe, inputs)

    def _pack(self, tensor: Tensor) -> _Kept | _View:
        original, recomputed = self._known.get(_memory(tensor), (None, None))
        # Something written into it since, by an adapter, say, is not in the recipe.
        if original is None or recomputed is None or original._version != recomputed.version:
            return _Kept(tensor, tensor._version)
        recomputed.views += 1
        return _View(recomputed, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` is what its class says: no adapter in its place, no hook on it, no other `forward`."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
    )


class _Kept(NamedTuple):
    """A tensor, and its version: with hooks around, autograd does not look after that."""

    tensor: Tensor
    version: int

    def get(self) -> Tensor:
        if _version(self.tensor) != self.version:
            raise RuntimeError(
                "a tensor needed for the gradient of a MambaMixer has been modified in place; "
                "call backward() before changing weights or inputs"
            )
        return self.tensor


class _Recomputed:
    """A tensor that exists only from its first to its last use in a backward pass."""

    def __init__(self, tensor: Tensor, recipe: Recipe, inputs: tuple[Tensor | None, ...]) -> None:
        self.version = tensor._version
        self.views = 0
        self._device = tensor.device.type
        self._recipe = recipe
        self._inputs = [None if i is None else _Kept(i.detach(), _version(i)) for i in inputs]
        self._value: Tensor | None = None
        self._uses = 0

    def get(self) -> Tensor:
        if self._value is None:
            inputs = [None if kept is None else kept.get() for kept in self._inputs]
            with torch.no_grad(), torch.autocast(self._device, enabled=False):
                self._value = self._recipe(*inputs)
            self._uses = self.views
        value = self._value
        self._uses -= 1
        if self._uses == 0:
            self._value = None
        return value


class _View(NamedTuple):
    """A view of a tensor that is recomputed."""

    base: _Recomputed
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def get(self) -> Tensor:
        return self.base.get().as_strided(self.size, self.stride, self.offset)


def _unpack(packed: _Kept | _View) -> Tensor:
    return packed.get()


def _memory(tensor: Tensor) -> int:
    """What is equal for a tensor and its views."""
    address: int = tensor.untyped_storage()._cdata
    return address


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def is_eager_autograd() -> bool:
    """Whether autograd records here, outside of `torch.compile` and of transforms of `torch.func`."""
    # A transform turns hooks off. There is no public way to see that, nor hooks that are in force.
    autograd: Any = torch._C._autograd
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and autograd._saved_tensors_hooks_is_enabled()
    )


def _is_ours() -> bool:
    """Whether what autograd saves here is for us to decide."""
    autograd: Any = torch._C._autograd
    return is_eager_autograd() and autograd._top_saved_tensors_default_hooks(False) is None
