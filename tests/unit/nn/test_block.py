from __future__ import annotations

import pytest
import torch

from mambakit.nn import Block, MambaMixer, RMSNorm


def make_block(residual_in_fp32: bool = True) -> Block:
    torch.manual_seed(0)
    return Block(RMSNorm(8), MambaMixer(8, d_state=4), residual_in_fp32)


def test_residual_stream():
    block = make_block()
    hidden, residual = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    out, total, state = block(hidden, residual)
    assert torch.equal(total, hidden + residual)
    expected, expected_state = block.mixer(block.norm(hidden + residual))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state.ssm_state, expected_state.ssm_state)

    out, total, _ = block(hidden)
    assert torch.equal(total, hidden)
    torch.testing.assert_close(out, block.mixer(block.norm(hidden))[0])


@pytest.mark.parametrize(("in_fp32", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_dtype_of_the_residual_stream(in_fp32, dtype):
    block = make_block(in_fp32).bfloat16()
    hidden = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    out, residual, _ = block(hidden)
    assert (out.dtype, residual.dtype) == (torch.bfloat16, dtype)
    out, residual, _ = block(out, residual)
    assert (out.dtype, residual.dtype) == (torch.bfloat16, dtype)
    with torch.no_grad():
        out, residual = block.step(hidden[:, 0], None, block.mixer.initial_state(2))
    assert (out.dtype, residual.dtype) == (torch.bfloat16, dtype)


def test_steps_equal_forward():
    block = make_block()
    hidden, residual = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    out, total, _ = block(hidden, residual)
    state = block.mixer.initial_state(2)
    with torch.no_grad():
        steps = [block.step(hidden[:, t], residual[:, t], state) for t in range(5)]
    torch.testing.assert_close(torch.stack([s[0] for s in steps], dim=1), out)
    torch.testing.assert_close(torch.stack([s[1] for s in steps], dim=1), total)
