from __future__ import annotations

import pytest
import torch

from mambakit.compat.mamba_ssm.modules.block import Block
from mambakit.compat.mamba_ssm.modules.mamba_simple import Block as OldBlock
from mambakit.compat.mamba_ssm.modules.mamba_simple import Mamba
from mambakit.compat.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn
from mambakit.compat.mamba_ssm.utils.generation import InferenceParams
from mambakit.errors import ConfigError, ShapeError

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def make_mixer(**fields) -> Mamba:
    mixer = Mamba(**{"d_model": 8, "d_state": 5, "layer_idx": 3, **fields})
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


def by_the_function(mixer, hidden):
    """The same by the official composition."""
    xz = torch.nn.functional.linear(hidden, mixer.in_proj.weight, mixer.in_proj.bias).transpose(
        1, 2
    )
    return mamba_inner_fn(
        xz, mixer.conv1d.weight, mixer.conv1d.bias, mixer.x_proj.weight, mixer.dt_proj.weight, mixer.out_proj.weight,
        mixer.out_proj.bias, -torch.exp(mixer.A_log), D=mixer.D, delta_bias=mixer.dt_proj.bias,
    )  # fmt: skip


def test_attributes_and_names():
    mixer = Mamba(32, d_state=4, d_conv=3, expand=2.0, layer_idx=7)
    found = (mixer.d_model, mixer.d_state, mixer.d_conv, mixer.expand, mixer.d_inner, mixer.dt_rank)
    assert found == (32, 4, 3, 2, 64, 2)
    assert (mixer.layer_idx, mixer.use_fast_path, mixer.activation) == (7, True, "silu")
    assert {*mixer.state_dict()} == {
        "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight",
        "dt_proj.bias", "out_proj.weight",
    }  # fmt: skip
    assert mixer.dt_proj.bias._no_reinit
    assert mixer.A_log._no_weight_decay
    assert Block is OldBlock


@pytest.mark.parametrize("fields", [{"expand": 1.5}, {"expand": 0}, {"dt_init": "zeros"}])
def test_wrong_fields(fields):
    [(name, value)] = fields.items()
    with pytest.raises(ConfigError, match=f"{name}: got {value!r}, wanted"):
        Mamba(8, **fields)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("use_fast_path", [False, True])
def test_forward_and_gradients_with_and_without_biases(bias, use_fast_path):
    """Upstream the backward pass of a mixer with biases fails."""
    mixer = make_mixer(bias=bias, use_fast_path=use_fast_path)
    hidden = torch.randn(2, 11, 8, requires_grad=True)
    inputs = [hidden, *mixer.parameters()]
    found, expected = mixer(hidden), by_the_function(mixer, hidden)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    weights = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, inputs, weights),
        torch.autograd.grad(expected, inputs, weights),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parts", [[11], [4, 1, 5, 1], [1] * 11, [1, 10]])
@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_a_cache_goes_on_with_any_number_of_positions(parts, records, d_conv):
    mixer = make_mixer(d_conv=d_conv)
    hidden = torch.randn(2, 11, 8)
    expected = mixer(hidden)
    params, found = InferenceParams(max_seqlen=11, max_batch_size=2), []
    with torch.set_grad_enabled(records):
        for part in hidden.split(parts, dim=1):
            found.append(mixer(part, inference_params=params))
            params.seqlen_offset += part.shape[1]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **TOLERANCE)
    conv_state, ssm_state = params.key_value_memory_dict[3]
    assert conv_state.shape == (2, 16, d_conv)
    assert ssm_state.shape == (2, 16, 5)
    assert not ssm_state.requires_grad


def test_gradients_go_through_a_cached_forward():
    mixer = make_mixer()
    params = InferenceParams(4, 1, seqlen_offset=1)
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    mixer(hidden, params).sum().backward()
    expected = hidden.grad.clone()
    hidden.grad = None
    mixer(hidden).sum().backward()
    torch.testing.assert_close(hidden.grad, expected, **TOLERANCE)


def test_a_new_sequence_forgets_the_old_one():
    mixer, params = make_mixer(), InferenceParams(9, 1)
    first, second = torch.randn(1, 9, 8), torch.randn(1, 9, 8)
    mixer(first, params)
    params.reset(9, 1)
    torch.testing.assert_close(mixer(second, params), mixer(second), **TOLERANCE)


@pytest.mark.parametrize("records", [False, True])
def test_step(records):
    mixer, hidden = make_mixer(), torch.randn(2, 6, 8)
    states, found = mixer.allocate_inference_cache(2, 6), []
    with torch.set_grad_enabled(records):
        for t in range(6):
            out, *returned = mixer.step(hidden[:, t : t + 1], *states)
            assert all(a is b for a, b in zip(returned, states, strict=True))
            found.append(out)
    torch.testing.assert_close(torch.cat(found, dim=1), mixer(hidden), **TOLERANCE)
    with pytest.raises(ShapeError, match="hidden_states: got 2 positions, wanted 1"):
        mixer.step(hidden[:, :2], *states)


def test_states_of_half_precision():
    mixer = Mamba(8, layer_idx=0, dtype=torch.bfloat16)
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert mixer.A_log.dtype == mixer.D.dtype == mixer.dt_proj.bias.dtype == torch.float32
    conv_state, ssm_state = mixer.allocate_inference_cache(2, 9)
    assert (conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.float32)
    conv_state, _ = mixer.allocate_inference_cache(2, 9, dtype=torch.float32)
    assert conv_state.dtype == torch.float32


def test_states_that_others_made_in_half_precision():
    mixer, hidden = make_mixer(), torch.randn(1, 7, 8)
    halves = [state.bfloat16() for state in mixer.allocate_inference_cache(1, 7)]
    params = InferenceParams(7, 1, seqlen_offset=1, key_value_memory_dict={3: halves})
    with torch.no_grad():
        found = torch.cat([mixer(part, params) for part in hidden.split(1, dim=1)], dim=1)
    torch.testing.assert_close(found, mixer(hidden), rtol=0.1, atol=0.05)
    assert halves[1].abs().sum() > 0


def test_another_batch_in_one_cache():
    mixer, params = make_mixer(), InferenceParams(9, 2)
    mixer(torch.randn(2, 3, 8), params)
    with pytest.raises(ShapeError, match="got states of 2 sequences, wanted 3 .*make new"):
        mixer(torch.randn(3, 3, 8), params)


def test_a_cache_needs_a_number_of_the_layer():
    with pytest.raises(ConfigError, match="layer_idx: got None"):
        make_mixer(layer_idx=None)(torch.randn(1, 2, 8), InferenceParams(2, 1))


def test_states_can_be_set_to_zero():
    mixer, params = make_mixer(), InferenceParams(3, 1)
    mixer(torch.randn(1, 3, 8), params)
    for state in mixer._get_states_from_cache(params, 1, initialize_states=True):
        assert not state.any()


def test_documents_in_a_row():
    mixer = make_mixer()
    first, second = torch.randn(1, 5, 8), torch.randn(1, 4, 8)
    packed = mixer(torch.cat([first, second], dim=1), seq_idx=torch.tensor([[0] * 5 + [1] * 4]))
    torch.testing.assert_close(packed, torch.cat([mixer(first), mixer(second)], dim=1), **TOLERANCE)


def test_made_on_another_device():
    assert Mamba(8, device="meta").in_proj.weight.is_meta
