"""`torch.compile` takes the functions and models as one graph."""

from __future__ import annotations

import pytest
import torch

from mambakit.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mambakit.compat.mamba_ssm import MambaLMHeadModel, mamba_inner_fn, selective_scan_fn
from mambakit.compat.mamba_ssm.models.config_mamba import MambaConfig
from mambakit.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # PyTorch's own.
]


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def assert_same(function, *inputs):
    results = []
    for run in (function, compiled(function)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = run(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves)])
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_selective_scan_fn():
    u, delta, z = torch.randn(3, 2, 6, 11)
    B, C = torch.randn(2, 2, 4, 11)
    A, D, bias = -torch.rand(6, 4), torch.randn(6), torch.randn(6)
    assert_same(lambda *t: selective_scan_fn(*t, True), u, delta, A, B, C, D, z, bias)


def test_causal_conv1d_fn():
    x, weight, bias = torch.randn(2, 6, 11), torch.randn(6, 4), torch.randn(6)
    assert_same(lambda *t: causal_conv1d_fn(*t, activation="silu"), x, weight, bias)


def test_mamba_inner_fn():
    shapes = ((2, 12, 9), (6, 1, 4), (6,), (3 + 8, 6), (6, 3), (5, 6), (5,))
    tensors = [torch.randn(shape) for shape in shapes]
    D, bias = torch.randn(2, 6)
    assert_same(
        lambda *t: mamba_inner_fn(*t[:-2], D=t[-2], delta_bias=t[-1]),
        *tensors, -torch.rand(6, 4), D, bias,
    )  # fmt: skip


def test_steps():
    x, dt = torch.randn(2, 2, 6)
    B, C = torch.randn(2, 2, 4)
    A, D = -torch.rand(6, 4), torch.randn(6)
    weight = torch.randn(6, 4)

    def step(conv_state, ssm_state):
        y = causal_conv1d_update(x, conv_state, weight, activation="silu")
        return selective_state_update(ssm_state, y, dt, A, B, C, D)

    states = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    copies = tuple(state.clone() for state in states)
    with torch.no_grad():
        torch.testing.assert_close(compiled(step)(*copies), step(*states))
    for copy, state in zip(copies, states, strict=True):
        torch.testing.assert_close(copy, state)


def test_language_model():
    model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=24))
    tokens = torch.randint(0, 24, (2, 9))
    expected = model(tokens).logits
    found = compiled(lambda ids: model(ids).logits)(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
