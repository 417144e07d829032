"""The same gradients as autograd's own, by fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from mambakit.nn import MambaMixer, joined_gradients
from mambakit.nn import mixer as mixer_module
from mambakit.nn.joined_gradients import linear_alone, linear_beside, linear_in_halves
from mambakit.nn.linear import Linear


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def assert_equal_gradients(
    ours: Callable[..., tuple[Tensor, Tensor]],
    theirs: Callable[..., tuple[Tensor, Tensor]],
    *leaves: Tensor | None,
) -> None:
    present = [tensor for tensor in leaves if tensor is not None and tensor.requires_grad]
    results = []
    for function in (ours, theirs):
        first, second = function(*leaves)
        loss = first.sin().sum() + (second * second.detach().cos()).sum()
        results.append([first, second, *torch.autograd.grad(loss, present)])
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("has_bias", [False, True])
def test_halves(has_bias: bool) -> None:
    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return linear(x, weight, bias).chunk(2, dim=-1)

    bias = leaf(10) if has_bias else None
    assert_equal_gradients(linear_in_halves, plain, leaf(2, 3, 4), leaf(10, 4), bias)
    frozen = torch.randn(10, 4)
    assert_equal_gradients(linear_in_halves, plain, leaf(2, 3, 4), frozen, bias)
    assert_equal_gradients(linear_in_halves, plain, torch.randn(2, 3, 4), leaf(10, 4), bias)


def test_beside() -> None:
    def plain(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x, linear(x, weight)

    assert_equal_gradients(linear_beside, plain, leaf(2, 3, 4), leaf(5, 4))
    assert_equal_gradients(linear_beside, plain, leaf(2, 3, 4), torch.randn(5, 4))
    assert_equal_gradients(linear_beside, plain, torch.randn(2, 3, 4), leaf(5, 4))


@pytest.mark.parametrize("has_bias", [False, True])
def test_alone(has_bias: bool) -> None:
    def twice(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda *leaves: (function(*leaves), function(*leaves))

    bias = leaf(5) if has_bias else None
    ours, theirs = twice(linear_alone), twice(linear)
    assert_equal_gradients(ours, theirs, leaf(2, 3, 4), leaf(5, 4), bias)
    assert_equal_gradients(ours, theirs, leaf(2, 3, 4), torch.randn(5, 4), bias)
    assert_equal_gradients(ours, theirs, torch.randn(2, 3, 4), leaf(5, 4), bias)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_under_autocast(monkeypatch: pytest.MonkeyPatch, has_bias: bool) -> None:
    """Alone where autocast narrows a weight that has a gradient, and nowhere else."""
    layer, x = Linear(4, 5, bias=has_bias), leaf(2, 3, 4)

    def run(enabled: bool = True) -> tuple[str, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
        trained = [p for p in (x, *layer.parameters()) if p.requires_grad]
        assert y.grad_fn is not None
        return y.grad_fn.name(), [y.detach(), *torch.autograd.grad(y.sin().sum(), trained)]

    _, expected = run()
    monkeypatch.setattr(joined_gradients, "JOINS_ON", ("cpu",))
    name, found = run()
    assert name == "_AloneBackward"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)  # autograd rounds
    assert run(enabled=False)[0] != "_AloneBackward"
    layer.weight.requires_grad_(False)
    assert run()[0] != "_AloneBackward"


def test_one_output_of_two() -> None:
    x, weight = leaf(2, 3, 4), leaf(10, 4)
    for index in (0, 1):
        rows = weight.chunk(2)[index]
        found = torch.autograd.grad(linear_in_halves(x, weight, None)[index].sum(), x)
        torch.testing.assert_close(found, torch.autograd.grad(linear(x, rows).sum(), x))
    found = torch.autograd.grad(linear_beside(x, weight)[0].sum(), x)
    torch.testing.assert_close(found, (torch.ones_like(x),))
    found = torch.autograd.grad(linear_beside(x, weight)[1].sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(linear(x, weight).sum(), x))


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    """In bfloat16 as autocast would, wherever the backward pass runs; and float32 stays float32."""
    x, weight = leaf(2, 3, 4), leaf(10, 4)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = linear_in_halves(x, weight, None)
        same, y = linear_beside(first, leaf(3, 5))
        assert {t.dtype for t in (first, second, same, y)} == {torch.bfloat16}
    exact = sum(part.sum() for part in linear_in_halves(x, weight, None))
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        gradients = torch.autograd.grad((first + second).sum() + y.sum(), (x, weight))
        exactly = torch.autograd.grad(exact, (x, weight))
    assert {g.dtype for g in (*gradients, *exactly)} == {torch.float32}
    expected = torch.autograd.grad(linear(x, weight).sum(), (x, weight))
    torch.testing.assert_close(exactly, expected)


def test_no_second_derivative_is_an_error_not_a_zero() -> None:
    x, weight = leaf(2, 3, 4), leaf(10, 4)
    first, _ = linear_in_halves(x, weight, None)
    (gradient,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"selective": ()}, {"selective": ("B",)}, {"A_init": "s4d-lin"}],
    ids=str,
)
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_mixer(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], recomputes: bool, checkpointed: bool
) -> None:
    mixer, hidden = MambaMixer(8, d_state=4, **options), leaf(2, 9, 8)
    leaves = [hidden, *mixer.parameters()]

    def gradients() -> tuple[Tensor, ...]:
        run = checkpoint(mixer, hidden, use_reentrant=False) if checkpointed else mixer(hidden)
        return torch.autograd.grad(run[0].square().sum() + run[1].conv_state.sum(), leaves)

    expected = gradients()
    monkeypatch.setattr(joined_gradients, "JOINS_ON", ("cpu",))
    monkeypatch.setattr(mixer_module, "RECOMPUTES_ON", ("cpu",) if recomputes else ())
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["in_proj", "x_proj"])
def test_a_layer_with_hooks_of_its_gradient_is_called(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(joined_gradients, "JOINS_ON", ("cpu",))
    mixer, seen = MambaMixer(8, d_state=4), list[str]()
    layer = getattr(mixer, name)
    layer.register_full_backward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_pre_hook(lambda *_: seen.append("before"))
    mixer(leaf(2, 9, 8))[0].sum().backward()
    assert seen == ["before", "after"]
