"""The custom ops obey torch.library, and torch.compile looks through the public functions without a break."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from mambakit import ops
from mambakit.ops.cpu import causal_conv1d as conv
from mambakit.ops.cpu import cross_entropy, rms_norm
from mambakit.ops.cpu import selective_scan as scan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def normal(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, requires_grad=grad)


def scan_inputs(grad: bool = True) -> dict[str, Tensor]:
    return {
        "x": normal(2, 5, 3, grad=grad), "dt": normal(2, 5, 3, grad=grad), "A": normal(3, 2, grad=grad),
        "B": normal(2, 5, 2, grad=grad), "C": normal(3, 2, grad=grad), "D": normal(3, grad=grad),
        "z": normal(2, 5, 3, grad=grad), "dt_bias": normal(3, grad=grad),
        "initial_state": normal(2, 3, 2, grad=grad),
    }  # fmt: skip


def test_selective_scan() -> None:
    tensors = list(scan_inputs().values())
    restart = torch.tensor([[False, False, True, False, False]] * 2)
    opcheck(scan._forward.overload, (*tensors, restart, True, True))
    absent = [None if i in (5, 6, 7, 8) else t for i, t in enumerate(tensors)]
    opcheck(scan._forward.overload, (*absent, None, False, True))


def test_selective_scan_step() -> None:
    plain = {k: v for k, v in scan_inputs(grad=False).items() if k != "initial_state"}
    now = {k: v[:, 0] if v.ndim == 3 else v for k, v in plain.items()}
    now["C"] = now["C"][None]
    opcheck(scan._step.overload, (normal(2, 3, 2, grad=False), *now.values(), True))


def test_causal_conv1d() -> None:
    age = torch.tensor([[9, 9, 0, 1, 2]] * 2)
    opcheck(
        conv._forward.overload,
        (normal(2, 5, 3), normal(3, 4), normal(3), normal(2, 3, 3), age, True),
    )
    opcheck(
        conv._forward.overload, (normal(2, 5, 3), normal(3, 1), None, normal(2, 0, 3), None, False)
    )
    state, x, weight = (
        normal(2, 3, 3, grad=False),
        normal(2, 3, grad=False),
        normal(3, 4, grad=False),
    )
    opcheck(conv._step.overload, (state, x, weight, None, True))


def test_rms_norm() -> None:
    opcheck(rms_norm._forward.overload, (normal(2, 5, 3), normal(2, 5, 3), normal(3), 1e-5))
    opcheck(rms_norm._forward.overload, (normal(2, 5, 3), None, normal(3), 1e-5))


def test_linear_cross_entropy() -> None:
    targets = torch.tensor([0, -100, 3])
    hidden, weight = normal(3, 4), normal(6, 4)
    opcheck(cross_entropy._forward.overload, (hidden, weight, targets, -100, True, True))
    frozen = weight.detach()
    opcheck(cross_entropy._forward.overload, (hidden, frozen, targets, -100, True, False))


def test_compiles_whole() -> None:
    inputs = scan_inputs()
    weight, norm_weight, head = normal(3, 4), normal(3), normal(7, 3)
    targets, seq_idx = torch.randint(0, 7, (2, 5)), torch.tensor([[0, 0, 1, 1, 1]] * 2)

    def network(inputs: dict[str, Tensor]) -> Tensor:
        x, _ = ops.causal_conv1d(inputs["x"], weight, activation="silu", seq_idx=seq_idx)
        y, state = ops.selective_scan(**{**inputs, "x": x}, dt_softplus=True, seq_idx=seq_idx)
        y, residual = ops.add_rms_norm(y, inputs["x"], norm_weight)
        loss = ops.linear_cross_entropy(ops.rms_norm(y, norm_weight), head, targets)
        return loss + state.sum() + residual.sum()

    leaves = [*inputs.values(), weight, norm_weight, head]
    expected = network(inputs)
    expected_gradients = torch.autograd.grad(expected, leaves)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    found = compiled(inputs)
    torch.testing.assert_close(found, expected)
    for gradient, truth in zip(torch.autograd.grad(found, leaves), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, truth)


def test_no_second_derivative_is_an_error_not_a_zero() -> None:
    inputs = scan_inputs()
    y, _ = ops.selective_scan(**inputs, backend="cpu")
    (gradient,) = torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd|backward"):
        gradient.sum().backward()
