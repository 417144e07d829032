"""One kind of operator for all backends: seen by those who look, skipped by plain eager code."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import TorchDispatchMode

from mambakit.ops.operators import Operator


def _run_square(x: Tensor, factor: float) -> Tensor:
    return factor * x * x


def _run_slope(dy: Tensor, x: Tensor, factor: float) -> Tensor:
    return 2 * factor * x * dy


def _keep(ctx, inputs, output) -> None:
    x, ctx.factor = inputs
    ctx.save_for_backward(x)


def _gradients(ctx, dy):
    return _slope(dy, *ctx.saved_tensors, ctx.factor), None


def _run_double(x: Tensor, unused: Tensor) -> Tensor:
    x.mul_(2)
    return x.clone()


_square = Operator(
    "cpu_test_square", "cpu", _run_square,
    fake=lambda x, factor: torch.empty_like(x), setup=_keep, gradients=_gradients,
)  # fmt: skip
_slope = Operator(
    "cpu_test_slope", "cpu", _run_slope, fake=lambda dy, x, factor: torch.empty_like(x)
)
_double = Operator(
    "cpu_test_double", "cpu", _run_double, fake=lambda x, unused: torch.empty_like(x), mutates=["x"]
)  # fmt: skip


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    pass


def observed(x: Tensor) -> Tensor:
    """The operator, called so that its place in autograd is made by the dispatcher."""
    with Names() as names:
        y = _square(x, 3.0)
    assert names.seen == ["mambakit.cpu_test_square.default"]
    return y


@pytest.mark.parametrize("call", [lambda x: _square(x, 3.0), observed])
def test_value_and_gradient(call) -> None:
    x = torch.tensor([2.0], requires_grad=True)
    y = call(x)
    y.backward()
    assert (y.item(), x.grad.item()) == (12.0, 12.0)
    with torch.no_grad():
        assert not call(x).requires_grad


@pytest.mark.parametrize("call", [lambda x: _square(x, 3.0), observed])
def test_what_has_no_second_derivative_says_so(call) -> None:
    x = torch.tensor([2.0], requires_grad=True)
    (slope,) = torch.autograd.grad(call(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cpu_test_slope has no derivative; use backend='ref"):
        slope.backward()


def test_transforms_and_subclasses_see_an_operator() -> None:
    x = torch.tensor([2.0])
    assert type(_square(x.as_subclass(Wrapped), 3.0)) is Wrapped
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: _square(x, 3.0).sum())(x)


def test_compiled_without_a_break() -> None:
    compiled = torch.compile(lambda x: _square(x, 3.0) + 1, fullgraph=True, backend="aot_eager")
    assert compiled(torch.tensor([2.0])).item() == 13.0


@pytest.mark.parametrize("call", [_double, _double.overload])
def test_a_change_in_place_is_counted(call) -> None:
    x = torch.tensor([2.0])
    increment_version(x)
    version = x._version
    assert call(x, x.new_zeros(1)).item() == 4.0
    assert x.item() == 4.0
    assert x._version > version


def test_the_first_call_does_not_import_a_compiler() -> None:
    program = (
        "import sys, torch; from mambakit.ops import rms_norm;"
        "rms_norm(torch.ones(2, 3), torch.ones(3), backend='cpu');"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
