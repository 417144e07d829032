"""Gradients of two halves meet in one memory where they can, and are right where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mambakit.ops.gradient_room import GradientRoom, room_for


class Takes(torch.autograd.Function):
    """x and 2 x; its backward notes what arrives."""

    joined: tuple[Tensor, ...]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.room = GradientRoom()
        return x.clone(), 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        Takes.joined = ctx.room.joined(gradients)
        return gradients[0] + 2 * gradients[1]


class Makes(torch.autograd.Function):
    """The square of an input, behind another that may be absent; its gradient goes where it is wanted."""

    @staticmethod
    def forward(ctx: Any, other: Tensor | None, x: Tensor) -> Tensor:
        ctx.save_for_backward(other, x)
        return x * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        other, x = ctx.saved_tensors
        room = room_for(ctx, (other, x), 1)
        return None, 2 * x * dy if room is None else torch.mul(2 * x, dy, out=room)


def square(x: Tensor, other: Tensor | None = None) -> Tensor:
    y: Tensor = Makes.apply(other, x)  # type: ignore[no-untyped-call]
    return y


def gradient(use: Callable[[Tensor, Tensor], Tensor]) -> int:
    """How many tensors the gradients of both halves are, which are compared with autograd's own."""
    x = torch.randn(2, 3, 5, requires_grad=True)
    (found,) = torch.autograd.grad(use(*Takes.apply(x)).sum(), x)  # type: ignore[no-untyped-call]
    (expected,) = torch.autograd.grad(use(x.clone(), 2 * x).sum(), x)
    torch.testing.assert_close(found, expected)
    return len(Takes.joined)


def test_both_are_one() -> None:
    assert gradient(lambda a, b: square(a) + square(b)) == 1
    first, second = Takes.joined[0].chunk(2, dim=-1)
    assert Takes.joined[0].shape == (2, 3, 10)
    assert first.data_ptr() < second.data_ptr()


def test_inputs_in_front_that_are_there_or_not() -> None:
    assert gradient(lambda a, b: square(a, torch.ones(1)) + square(b)) == 1
    assert gradient(lambda a, b: square(a) + square(b, torch.ones(1, requires_grad=True))) == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda a, b: square(a) + b * b,
        lambda a, b: a * a + square(b),
        lambda a, b: square(a),
        lambda a, b: square(a) + square(b) + square(b),
        lambda a, b: square(a) + square(b) + a,
        lambda a, b: square(a) + square(2 * b),
        lambda a, b: square(b)[..., :1] + square(b[..., :1]) + square(a),
    ],
)
def test_where_they_cannot_be(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert gradient(use) == 2


def test_a_hook_that_puts_another_in_its_place() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    first, second = Takes.apply(x)  # type: ignore[no-untyped-call]
    second.register_hook(lambda g: 3 * g)
    (found,) = torch.autograd.grad((square(first) + square(second)).sum(), x)
    torch.testing.assert_close(found, 2 * x + 3 * 8 * x)
    assert len(Takes.joined) == 2


def test_a_graph_that_is_used_again() -> None:
    """Also after a pass that ended before the halves met: what it gave out stays as it is."""
    x = torch.randn(2, 3, requires_grad=True)
    first, second = Takes.apply(x)  # type: ignore[no-untyped-call]
    loss = (square(first) + square(second)).sum()
    (kept,) = torch.autograd.grad(loss, second, retain_graph=True)
    before = kept.clone()
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, x, retain_graph=True)
        torch.testing.assert_close(found, 10 * x)
        assert len(Takes.joined) == 1
    assert torch.equal(kept, before)


def test_a_pass_that_records_has_no_room() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    first, second = Takes.apply(x)  # type: ignore[no-untyped-call]
    (found,) = torch.autograd.grad((square(first) + square(second)).sum(), x, create_graph=True)
    torch.testing.assert_close(found, 10 * x)
    assert len(Takes.joined) == 2


def test_a_half_is_given_out_once() -> None:
    room, output = GradientRoom(), torch.empty(2, 3, dtype=torch.bfloat16)
    halves = [room.half(index, output) for index in (0, 1, 1)]
    assert len({half.data_ptr() for half in halves}) == 3
    assert all(half.dtype == torch.bfloat16 and half.shape == (2, 3) for half in halves)
    assert halves[2].untyped_storage()._cdata != halves[1].untyped_storage()._cdata
    assert room.joined(halves[:2]) == tuple(halves[:2])  # it knows the last memory only


class Watches(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


def test_a_pass_that_a_mode_observes_has_no_room() -> None:
    with Watches():
        assert gradient(lambda a, b: square(a) + square(b)) == 2
