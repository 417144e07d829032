"""Our model against `MambaForCausalLM` of transformers: the same weights give the same numbers."""

from __future__ import annotations

import pytest
import torch

from mambakit.models import MambaConfig, MambaLanguageModel

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # The peer's own, of which it has many.


def make_pair(**fields):
    torch.manual_seed(0)
    fields = {"d_model": 32, "n_layer": 3, "vocab_size": 96, "d_state": 8, **fields}
    config = MambaConfig(**fields)
    peer = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layer,
            vocab_size=config.padded_vocab_size,
            state_size=config.d_state,
            conv_kernel=config.d_conv,
            expand=config.expand,
            time_step_rank=config.dt_rank,
            use_bias=config.bias,
            use_conv_bias=config.conv_bias,
            tie_word_embeddings=config.tie_embeddings,
        )
    ).eval()
    for parameter in peer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    weights = {
        name.replace("embeddings", "embedding"): tensor
        for name, tensor in peer.state_dict().items()
    }
    model = MambaLanguageModel(config)
    model.load_state_dict(weights)
    return model, peer


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_embeddings": False, "bias": True, "conv_bias": False, "dt_rank": 5, "expand": 1}],
)
def test_same_logits_and_loss(fields):
    model, peer = make_pair(**fields)
    tokens = torch.randint(0, 96, (2, 33))
    expected = peer(tokens, labels=tokens)
    logits, _ = model(tokens)
    assert (logits - expected.logits).abs().max() < 1e-4
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_same_gradients():
    model, peer = make_pair()
    tokens = torch.randint(0, 96, (2, 17))
    peer(tokens, labels=tokens).loss.backward()
    model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
    ours = dict(model.named_parameters())
    for name, parameter in peer.named_parameters():
        gradient = ours[name.replace("embeddings", "embedding")].grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_same_greedy_continuation():
    model, peer = make_pair()
    prompt = torch.randint(0, 96, (1, 12))
    expected = peer.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert model.generate(prompt.tolist(), max_tokens=20, temperature=0) == [
        expected[0, 12:].tolist()
    ]
