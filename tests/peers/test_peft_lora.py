"""LoRA adapters of peft on our model: the mixer calls its layers, so wrapping them is enough."""

from __future__ import annotations

import pytest
import torch

from mambakit.models import MambaConfig, MambaLanguageModel

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # The peer's own.

MIXER = ["in_proj", "x_proj", "dt_proj", "out_proj"]


def with_adapters(target_modules):
    torch.manual_seed(0)
    model = MambaLanguageModel(
        MambaConfig(d_model=16, n_layer=2, vocab_size=40, tie_embeddings=False)
    )
    tokens = torch.randint(0, 40, (2, 9))
    before, _ = model(tokens)
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(r=3, target_modules=target_modules, init_lora_weights=False), model
    )
    return adapted, tokens, before.detach()


def test_gradients_reach_every_adapter_and_nothing_else():
    model, tokens, before = with_adapters(MIXER)
    assert not torch.allclose(model(tokens)[0], before)
    model.loss(tokens, tokens)[0].backward()
    adapters = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            adapters += 1
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    assert adapters == 2 * len(MIXER) * 2


def test_adapters_of_the_head_count_in_the_loss():
    model, tokens, _ = with_adapters(["lm_head"])
    loss, _ = model.loss(tokens, tokens)
    expected = torch.nn.functional.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.lm_head.lora_B["default"].weight.grad.abs().sum() > 0


def test_merged_equals_unmerged():
    model, tokens, _ = with_adapters(MIXER)
    expected, _ = model(tokens)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    merged, _ = model(tokens)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_steps_use_the_adapters():
    model, tokens, _ = with_adapters(MIXER)
    expected, _ = model(tokens)
    state = model.initial_state(2)
    logits = [model.step(tokens[:, t], state) for t in range(9)]
    torch.testing.assert_close(torch.stack(logits, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_the_recurrence_in_float32():
    model, tokens, _ = with_adapters(MIXER)
    model.bfloat16()
    mixer = model.backbone.layers[0].mixer
    assert mixer.dt_proj.base_layer.bias.dtype == torch.float32
    assert mixer.dt_proj.base_layer.weight.dtype == torch.bfloat16
    assert model(tokens)[0].dtype == torch.bfloat16
