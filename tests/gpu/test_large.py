"""More than 2^31 elements in a tensor: every offset is 64 bits wide. Takes about 45 GiB of the GPU's memory.

One group for pytest-xdist (`--dist loadgroup`), so that two of them never run at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from examples import skip_or_fail
from torch import Tensor

from mambakit.ops import add_rms_norm, causal_conv1d, linear_cross_entropy, selective_scan

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.xdist_group("large")]

WIDTH = 1024
SEQLEN = 2**31 // WIDTH + 1000
TAIL = 1500
"""Rows at the end, on both sides of element 2^31, that are compared with a call for them alone."""

normal = partial(torch.randn, device="cuda", dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 64 * 2**30:
        skip_or_fail(f"this test needs 64 GiB of GPU memory, {free / 2**30:.0f} are free")
    torch.cuda.reset_peak_memory_stats()
    yield
    assert torch.cuda.max_memory_allocated() < 70 * 2**30
    torch.cuda.empty_cache()


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def test_selective_scan() -> None:
    d_state = 16
    long = {name: normal(1, SEQLEN, WIDTH).requires_grad_() for name in ("x", "dt", "z")}
    long |= {name: normal(1, SEQLEN, d_state).requires_grad_() for name in ("B", "C")}
    # No state remembers more than some thousand steps: over more, the last bits of the decays
    # add up to something that one other order of steps would not give.
    A = -0.01 - torch.rand(WIDTH, d_state, device="cuda") * torch.arange(
        1, d_state + 1, device="cuda"
    )
    parameters = {
        "A": A, "D": torch.randn(WIDTH, device="cuda"), "dt_bias": torch.full((WIDTH,), -4.0, device="cuda")
    }  # fmt: skip
    scan = partial(selective_scan, **parameters, dt_softplus=True)
    y, final = scan(**long)
    dy = normal(1, SEQLEN, WIDTH)
    y.backward(dy)

    with torch.no_grad():
        _, state = scan(**{name: tensor[:, :-TAIL] for name, tensor in long.items()})
    tail = {name: leaf(tensor[:, -TAIL:]) for name, tensor in long.items()}
    tail_y, tail_final = scan(**tail, initial_state=state)
    tail_y.backward(dy[:, -TAIL:])
    torch.testing.assert_close(final, tail_final, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y[:, -TAIL:], tail_y, rtol=0.02, atol=0.02)
    for name, tensor in tail.items():
        expected, found = tensor.grad, long[name].grad[:, -TAIL:]
        assert (found - expected).norm() < 0.01 * expected.norm(), name

    head = {name: tensor[:, :TAIL].detach() for name, tensor in long.items()}
    torch.testing.assert_close(y[:, :TAIL], scan(**head)[0], rtol=0.02, atol=0.02)


def test_causal_conv1d() -> None:
    x = normal(1, SEQLEN, WIDTH).requires_grad_()
    conv = partial(
        causal_conv1d, weight=normal(WIDTH, 4), bias=normal(WIDTH), activation="silu"
    )  # fmt: skip
    y, state = conv(x)
    dy = normal(1, SEQLEN, WIDTH)
    y.backward(dy)
    before = x[:, -TAIL - 3 : -TAIL].detach().transpose(1, 2)
    tail = leaf(x[:, -TAIL:])
    tail_y, tail_state = conv(tail, initial_state=before)
    tail_y.backward(dy[:, -TAIL:])
    assert torch.equal(y[:, -TAIL:], tail_y)
    assert torch.equal(state, tail_state)
    assert torch.equal(x.grad[:, -TAIL:], tail.grad)


def test_add_rms_norm() -> None:
    x, weight = normal(SEQLEN, WIDTH).requires_grad_(), torch.randn(WIDTH, device="cuda")
    residual = normal(SEQLEN, WIDTH).requires_grad_()
    y, total = add_rms_norm(x, residual, weight)
    dy = normal(SEQLEN, WIDTH)
    torch.autograd.backward([y, total], [dy, dy])
    ends = leaf(x[-TAIL:]), leaf(residual[-TAIL:])
    tail_y, tail_total = add_rms_norm(*ends, weight)
    torch.autograd.backward([tail_y, tail_total], [dy[-TAIL:], dy[-TAIL:]])
    assert torch.equal(y[-TAIL:], tail_y)
    assert torch.equal(total[-TAIL:], tail_total)
    assert torch.equal(x.grad[-TAIL:], ends[0].grad)
    assert torch.equal(residual.grad[-TAIL:], ends[1].grad)


def test_linear_cross_entropy() -> None:
    """Only the last rows count, so that both losses are the same mean."""
    hidden, weight = normal(SEQLEN, WIDTH).requires_grad_(), normal(64, WIDTH) / 32
    targets = torch.randint(0, 64, (SEQLEN,), device="cuda")
    targets[:-TAIL] = -100
    linear_cross_entropy(hidden, weight, targets).backward()
    tail = leaf(hidden[-TAIL:])
    linear_cross_entropy(tail, weight, targets[-TAIL:]).backward()
    torch.testing.assert_close(hidden.grad[-TAIL:], tail.grad)
    assert not hidden.grad[:-TAIL].any()
