from __future__ import annotations

import torch

from mambakit.nn import MixerState


def make_state(batch: int = 3) -> MixerState:
    torch.manual_seed(0)
    return MixerState(torch.randn(batch, 4, 3), torch.randn(batch, 4, 2))


def test_clone_is_independent():
    state = make_state()
    copy = state.clone()
    copy.reset()
    assert state.ssm_state.abs().min() > 0
    assert torch.equal(copy.ssm_state, torch.zeros(3, 4, 2))
    assert torch.equal(copy.conv_state, torch.zeros(3, 4, 3))


def test_select_and_cat():
    state = make_state()
    assert state.batch_size == 3
    picked = state.select(torch.tensor([2, 0, 0]))
    assert torch.equal(picked.ssm_state, state.ssm_state[[2, 0, 0]])
    assert torch.equal(picked.conv_state, state.conv_state[[2, 0, 0]])
    picked.reset()
    assert state.ssm_state.abs().min() > 0
    both = MixerState.cat([state.select(torch.tensor([0])), state.select(torch.tensor([1, 2]))])
    assert torch.equal(both.ssm_state, state.ssm_state)
    assert torch.equal(both.conv_state, state.conv_state)


def test_detach_and_to():
    state = make_state()
    state.ssm_state.requires_grad_()
    assert not state.detach().ssm_state.requires_grad
    assert state.to("meta").conv_state.device.type == "meta"
