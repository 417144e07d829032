"""The mixers of the other blocks: H3's, and Mamba's without its gate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mambakit.nn import H3Mixer, MambaMixer, UngatedMixer
from mambakit.ops import selective_scan

KINDS = [H3Mixer, UngatedMixer]
VARIANTS = {
    "default": {},
    "biases": {"bias": True, "conv_bias": False},
    "nothing selective": {"selective": ()},
    "complex, nothing selective": {"A_init": "s4d-lin", "selective": ()},
    "conv 1": {"d_conv": 1},
}


def make_mixer(kind: type[MambaMixer], **options) -> MambaMixer:
    torch.manual_seed(0)
    mixer = kind(8, **{"d_state": 4, **options})
    for parameter in mixer.parameters():  # zero biases and equal rows would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


@pytest.mark.parametrize("bias", [False, True])
def test_h3_is_its_equations(bias):
    mixer = make_mixer(H3Mixer, bias=bias, dt_rank=3).double()
    p = dict(mixer.named_parameters())
    hidden = torch.randn(2, 7, 8, dtype=torch.float64)
    q, k, v = F.linear(hidden, p["in_proj.weight"], p.get("in_proj.bias")).split(16, dim=-1)
    k = F.pad(k.transpose(1, 2), (3, 0))
    k = F.conv1d(k, p["conv1d.weight"], p["conv1d.bias"], groups=16).transpose(1, 2)
    x = k * v
    dt, B, C = F.linear(x, p["x_proj.weight"]).split([3, 4, 4], dim=-1)
    dt = F.softplus(F.linear(dt, p["dt_proj.weight"], p["dt_proj.bias"]))
    y, _ = selective_scan(x, dt, -p["A_log"].exp(), B, C, p["D"])
    wanted = F.linear(q * y, p["out_proj.weight"], p.get("out_proj.bias"))
    torch.testing.assert_close(mixer(hidden)[0], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_ungated_is_its_equations(bias):
    mixer = make_mixer(UngatedMixer, bias=bias, dt_rank=3).double()
    p = dict(mixer.named_parameters())
    hidden = torch.randn(2, 7, 8, dtype=torch.float64)
    x = F.linear(hidden, p["in_proj.weight"], p.get("in_proj.bias"))
    x = F.pad(x.transpose(1, 2), (3, 0))
    x = F.silu(F.conv1d(x, p["conv1d.weight"], p["conv1d.bias"], groups=16)).transpose(1, 2)
    dt, B, C = F.linear(x, p["x_proj.weight"]).split([3, 4, 4], dim=-1)
    dt = F.softplus(F.linear(dt, p["dt_proj.weight"], p["dt_proj.bias"]))
    y, _ = selective_scan(x, dt, -p["A_log"].exp(), B, C, p["D"])
    wanted = F.linear(y, p["out_proj.weight"], p.get("out_proj.bias"))
    torch.testing.assert_close(mixer(hidden)[0], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_steps_continue_exactly(kind, options):
    mixer = make_mixer(kind, **options)
    hidden = torch.randn(2, 7, 8)
    whole, last = mixer(hidden)
    first, state = mixer(hidden[:, :3])
    second, state = mixer(hidden[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(state.ssm_state, last.ssm_state)
    stepped = mixer.initial_state(2)
    with torch.no_grad():
        outputs = [mixer.step(hidden[:, t], stepped) for t in range(7)]
    torch.testing.assert_close(torch.stack(outputs, dim=1), whole)
    torch.testing.assert_close(stepped.ssm_state, last.ssm_state)
    torch.testing.assert_close(stepped.conv_state, last.conv_state)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_apart(kind):
    mixer = make_mixer(kind)
    hidden = torch.randn(1, 7, 8)
    whole, _ = mixer(hidden, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    torch.testing.assert_close(whole[:, 3:], mixer(hidden[:, 3:])[0])


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind, options):
    mixer = make_mixer(kind, **options)
    mixer(torch.randn(2, 5, 8))[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
