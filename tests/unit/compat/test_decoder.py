from __future__ import annotations

import pytest
import torch
from torch import nn

from mambakit.compat.mamba_ssm.models import decoder
from mambakit.compat.mamba_ssm.models.config_mamba import MambaConfig
from mambakit.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mambakit.compat.mamba_ssm.utils.generation import InferenceParams

SMALL = {"d_model": 16, "n_layer": 2, "vocab_size": 21, "tie_embeddings": False}


def make_model(**fields) -> MambaLMHeadModel:
    model = MambaLMHeadModel(MambaConfig(**{**SMALL, **fields}))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_embeddings": True},
        {"ssm_cfg": {"d_state": 4, "d_conv": 3, "bias": True}},
        {"residual_in_fp32": False},
    ],
)
def test_same_logits_and_shared_weights(fields):
    model, tokens = make_model(**fields), torch.randint(0, 21, (2, 9))
    reader = model.decoder()
    assert {p.data_ptr() for p in reader.parameters()} == {p.data_ptr() for p in model.parameters()}
    expected = model(tokens).logits
    params, found = InferenceParams(9, 2), []
    with torch.no_grad():
        for part in tokens.split([4, 1, 1, 2, 1], dim=1):
            found.append(reader(part, inference_params=params, num_last_tokens=1).logits)
            params.seqlen_offset += part.shape[1]
    torch.testing.assert_close(
        torch.cat(found, dim=1), expected[:, [3, 4, 5, 7, 8]], rtol=1e-4, atol=1e-4
    )


def test_generate_goes_through_it(monkeypatch):
    model, prompts = make_model(), torch.randint(0, 21, (2, 5))
    calls = []
    call = decoder.Decoder.__call__

    def counted(self, tokens, **arguments):
        calls.append(tokens.shape[1])
        return call(self, tokens, **arguments)

    monkeypatch.setattr(decoder.Decoder, "__call__", counted)
    found = model.generate(prompts, 12)
    assert calls == [5] + [1] * 6
    model.decoder = lambda: None
    assert torch.equal(model.generate(prompts, 12), found)
    assert len(calls) == 7


def test_what_is_frozen_stays_frozen():
    model = make_model().requires_grad_(False)
    model.lm_head.weight.requires_grad_()
    model.generate(torch.tensor([[1, 2]]), 5)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["lm_head.weight"]


def test_ids_of_the_padding_are_read():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[23] = 9 * model.lm_head.weight.abs().sum(0)
        model.lm_head.weight[22] = -model.lm_head.weight[23]
    found = model.generate(torch.tensor([[1, 2]]), 8)
    assert found.max() >= 21


def test_changed_weights_are_seen():
    model, prompts = make_model(), torch.randint(0, 21, (1, 5))
    before = model.generate(prompts, 20)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.5 * torch.randn_like(parameter)
    after = model.generate(prompts, 20)
    assert not torch.equal(after, before)
    assert torch.equal(after[:, 1:][:, 4:], model(after).logits[:, 4:-1].argmax(-1))


def with_a_hook(model):
    model.backbone.layers[1].mixer.out_proj.register_forward_hook(lambda *_: None)


def with_another_layer(model):
    model.backbone.layers[0].mixer.x_proj = nn.Sequential(model.backbone.layers[0].mixer.x_proj)


def with_a_subclass(model):
    model.__class__ = type("Other", (MambaLMHeadModel,), {})


@pytest.mark.parametrize("change", [with_a_hook, with_another_layer, with_a_subclass])
def test_what_is_not_plain_is_called_itself(change):
    model, prompts = make_model(), torch.randint(0, 21, (1, 5))
    expected = model.generate(prompts, 12)
    change(model)
    assert model.decoder() is None
    assert torch.equal(model.generate(prompts, 12), expected)


def test_a_layer_norm_model_is_called_itself():
    assert make_model(rms_norm=False).decoder() is None
