from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from mambakit.nn import MambaMixer

VARIANTS = {
    "default": {},
    "dt_rank 1": {"dt_rank": 1},
    "biases": {"bias": True, "conv_bias": False},
    "nothing selective": {"selective": ()},
    "only dt": {"selective": ("dt",)},
    "only B": {"selective": ("B",), "A_init": "constant"},
    "B and C": {"selective": ("B", "C"), "A_init": "random"},
    "complex": {"A_init": "s4d-lin"},
    "complex, nothing selective": {"A_init": "s4d-lin", "selective": ()},
    "complex, dt and C": {"A_init": "s4d-lin", "selective": ("dt", "C"), "dt_rank": 3},
    "state 1, conv 2": {"d_state": 1, "d_conv": 2},
    "conv 1": {"d_conv": 1},
    "conv longer than the sequence": {"d_conv": 9},
    "norms": {"norm_epsilon": 0.01, "dt_rank": 3},
    "norms, only C": {"norm_epsilon": 0.01, "selective": ("C",)},
    "norms, complex": {"norm_epsilon": 0.01, "A_init": "s4d-lin", "dt_rank": 3},
    "norms of nothing": {"norm_epsilon": 0.01, "selective": ()},
}


def make_mixer(**options) -> MambaMixer:
    torch.manual_seed(0)
    mixer = MambaMixer(8, **{"d_state": 4, **options})
    for parameter in mixer.parameters():  # zero biases and equal rows would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


def by_hand(mixer: MambaMixer, hidden: torch.Tensor) -> torch.Tensor:
    """The equations of the paper, written again, one time step after another."""

    def scaled(part: torch.Tensor) -> torch.Tensor:
        eps = mixer.norm_epsilon
        return part if eps is None else F.rms_norm(part, part.shape[-1:], eps=eps)

    p = dict(mixer.named_parameters())
    batch, seqlen, _ = hidden.shape
    d_inner, d_state = p["A_log"].shape
    pad = p["conv1d.weight"].shape[-1] - 1

    x, z = F.linear(hidden, p["in_proj.weight"], p.get("in_proj.bias")).chunk(2, dim=-1)
    x = F.pad(x.transpose(1, 2), (pad, 0))
    x = F.silu(F.conv1d(x, p["conv1d.weight"], p.get("conv1d.bias"), groups=d_inner))
    x = x.transpose(1, 2)

    A = -p["A_log"].exp()
    numbers = d_state
    if "A_imag" in p:
        A, numbers = torch.complex(A, p["A_imag"]), 2 * d_state
    rest = F.linear(x, p["x_proj.weight"]) if "x_proj.weight" in p else x[..., :0]
    if "dt_bias" in p:
        dt = p["dt_bias"].expand(batch, seqlen, d_inner)
    else:
        rank = p["dt_proj.weight"].shape[1]
        dt = F.linear(scaled(rest[..., :rank]), p["dt_proj.weight"], p["dt_proj.bias"])
        rest = rest[..., rank:]
    dt = F.softplus(dt)
    weights = []
    for name in ("B", "C"):
        if name in p:
            weight = p[name].expand(batch, seqlen, *p[name].shape)
        else:
            weight, rest = scaled(rest[..., :numbers]), rest[..., numbers:]
            weight = weight.reshape(batch, seqlen, 1, d_state, -1).squeeze(-1)
        weights.append(torch.view_as_complex(weight.contiguous()) if "A_imag" in p else weight)
    B, C = weights

    h, ys = torch.zeros(batch, d_inner, d_state, dtype=A.dtype), []
    for t in range(seqlen):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt * x)[:, t, :, None] * B[:, t]
        y = (h * C[:, t]).sum(-1)
        ys.append(2 * y.real if y.is_complex() else y)
    y = torch.stack(ys, dim=1) + p["D"] * x
    return F.linear(y * F.silu(z), p["out_proj.weight"], p.get("out_proj.bias"))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_forward_is_the_equations(options):
    mixer = make_mixer(**options).double()
    hidden = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(hidden)[0], by_hand(mixer, hidden), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_parts_and_steps_continue_exactly(options):
    mixer = make_mixer(**options)
    hidden = torch.randn(2, 7, 8)
    whole, last = mixer(hidden)
    first, state = mixer(hidden[:, :3])
    second, state = mixer(hidden[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(state.ssm_state, last.ssm_state)
    torch.testing.assert_close(state.conv_state, last.conv_state)

    stepped = mixer.initial_state(2)
    with torch.no_grad():
        outputs = [mixer.step(hidden[:, t], stepped) for t in range(7)]
    torch.testing.assert_close(torch.stack(outputs, dim=1), whole)
    torch.testing.assert_close(stepped.ssm_state, last.ssm_state)
    torch.testing.assert_close(stepped.conv_state, last.conv_state)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_gets_a_gradient(options):
    mixer = make_mixer(**options)
    mixer(torch.randn(2, 5, 8))[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_names_of_what_is_not_selective():
    assert {n for n, _ in make_mixer(selective=()).named_parameters(recurse=False)} == {
        "A_log", "B", "C", "D", "dt_bias",
    }  # fmt: skip
    mixer = make_mixer(selective=("C",), A_init="s4d-lin")
    shapes = {name: tuple(parameter.shape) for name, parameter in mixer.named_parameters()}
    assert shapes["B"] == (16, 4, 2)
    assert shapes["x_proj.weight"] == (8, 16)
    assert shapes["A_imag"] == (16, 4)
    assert "C" not in shapes
    assert "dt_proj.weight" not in shapes


def test_initial_values():
    torch.manual_seed(0)
    mixer = MambaMixer(1024, dt_init_floor=1e-4)
    assert torch.equal(mixer.A_log, torch.arange(1, 17.0).log().expand(2048, 16))
    assert torch.equal(mixer.D, torch.ones(2048))
    dt = F.softplus(mixer.dt_proj.bias)
    assert 0.001 * 0.999 <= dt.min() < 0.0011
    assert 0.09 < dt.max() <= 0.1 * 1.001
    # Log-uniform: a quarter of the steps lies in each quarter of the range on a log scale.
    quarters = torch.histc(dt.log(), 4, math.log(0.001), math.log(0.1)) / 2048
    assert (quarters - 0.25).abs().max() < 0.04
    bound = 64**-0.5
    assert 0.99 * bound < mixer.dt_proj.weight.abs().max() <= bound

    mixer = MambaMixer(64, dt_init="constant", dt_scale=2.0, dt_init_floor=0.05)
    assert torch.equal(mixer.dt_proj.weight, torch.full((128, 4), 1.0))
    assert F.softplus(mixer.dt_proj.bias).min() >= 0.05 * 0.999


def test_initial_decay():
    torch.manual_seed(0)
    assert torch.equal(MambaMixer(8, A_init="constant").A_log, torch.full((16, 16), math.log(0.5)))
    A_log = MambaMixer(256, A_init="random").A_log
    assert abs(A_log.mean()) < 0.05
    assert abs(A_log.std() - 1) < 0.05
    mixer = MambaMixer(8, A_init="s4d-lin")
    assert torch.equal(mixer.A_log, torch.full((16, 16), math.log(0.5)))
    assert torch.equal(mixer.A_imag, torch.arange(16.0).expand(16, 16))


def test_initial_weights_that_are_not_selective():
    torch.manual_seed(0)
    mixer = MambaMixer(256, selective=())
    assert torch.equal(mixer.B, torch.ones(512, 16))
    assert abs(mixer.C.std() - 1) < 0.05
    mixer = MambaMixer(256, selective=(), A_init="s4d-lin")
    assert torch.equal(torch.view_as_complex(mixer.B.data), torch.ones(512, 16, dtype=torch.cfloat))
    assert abs(torch.view_as_complex(mixer.C.data).abs().square().mean() - 1) < 0.05


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_the_recurrence_stays_float32(narrow):
    mixer = make_mixer()
    before = {name: parameter.clone() for name, parameter in mixer.named_parameters()}
    mixer(torch.randn(1, 3, 8))[0].sum().backward()
    mixer.to(narrow)
    kept = {"A_log", "D", "dt_proj.bias"}
    for name, parameter in mixer.named_parameters():
        assert parameter.dtype == (torch.float32 if name in kept else narrow), name
        assert parameter.grad.dtype == parameter.dtype, name
        if name in kept:
            assert torch.equal(parameter, before[name]), name
    hidden = torch.randn(2, 5, 8, dtype=narrow)
    y, state = mixer(hidden)
    assert y.dtype == narrow
    assert state.conv_state.dtype == narrow
    assert state.ssm_state.dtype == torch.float32
    stepped = mixer.initial_state(2)
    with torch.no_grad():
        outputs = [mixer.step(hidden[:, t], stepped) for t in range(5)]
    torch.testing.assert_close(torch.stack(outputs, dim=1), y, rtol=0.05, atol=0.02)


def test_double_widens_everything():
    mixer = make_mixer().double()
    assert {parameter.dtype for parameter in mixer.parameters()} == {torch.float64}


def marked(mixer: MambaMixer) -> set[str]:
    return {n for n, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}


def test_no_weight_decay_marks_survive_moving_and_loading():
    kept = {"A_log", "D", "dt_proj.bias"}
    mixer = make_mixer()
    assert marked(mixer) == kept
    with torch.device("meta"):
        empty = MambaMixer(8, d_state=4)
    moved = copy.deepcopy(empty).to_empty(device="cpu")
    assert marked(moved) == kept
    empty.load_state_dict(mixer.state_dict(), assign=True)
    assert marked(empty) == kept
    assert marked(make_mixer(selective=(), A_init="s4d-lin")) == {
        "A_log", "A_imag", "B", "C", "D", "dt_bias",
    }  # fmt: skip


def test_autocast_runs_the_matrices_in_bfloat16():
    mixer = make_mixer()
    hidden = torch.randn(2, 6, 8)
    exact, _ = mixer(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(hidden)
        stepped = mixer.initial_state(2)
        with torch.no_grad():
            outputs = [mixer.step(hidden[:, t], stepped) for t in range(6)]
    assert y.dtype == state.conv_state.dtype == stepped.conv_state.dtype == torch.bfloat16
    assert state.ssm_state.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)
    torch.testing.assert_close(torch.stack(outputs, dim=1), y, rtol=0.05, atol=0.02)


def test_gradient_flows_through_the_state():
    mixer = make_mixer().double()
    hidden = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(mixer(hidden)[0][:, 5].sum(), hidden)
    _, state = mixer(hidden[:, :4])
    (parts,) = torch.autograd.grad(mixer(hidden[:, 4:], state)[0][:, 1].sum(), hidden)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)
    _, state = mixer(hidden[:, :4])
    (cut,) = torch.autograd.grad(mixer(hidden[:, 4:], state.detach())[0].sum(), hidden)
    assert torch.equal(cut[:, :4], torch.zeros_like(cut[:, :4]))


def test_a_complex_step_of_one_row_with_an_odd_rank() -> None:
    """One row of the projection counts as contiguous, at whatever offset B begins in it."""
    mixer = make_mixer(A_init="s4d-lin", dt_rank=3)
    hidden = torch.randn(1, 2, 8)
    with torch.no_grad():
        expected, _ = mixer(hidden)
        state = mixer.initial_state(1)
        steps = [mixer.step(hidden[:, t], state) for t in range(2)]
    torch.testing.assert_close(torch.stack(steps, dim=1), expected)
