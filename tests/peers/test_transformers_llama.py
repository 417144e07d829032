"""Our Transformer against `LlamaForCausalLM` of transformers: the same weights give the same numbers."""

from __future__ import annotations

import pytest
import torch

from mambakit.models import TransformerConfig, TransformerLanguageModel

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # The peer's own, of which it has many.


def make_pair(**fields):
    torch.manual_seed(0)
    config = TransformerConfig(d_model=48, n_layer=3, n_head=3, vocab_size=96, **fields)
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            intermediate_size=config.resolved_d_mlp,
            vocab_size=config.padded_vocab_size,
            max_position_embeddings=256,
            rms_norm_eps=config.norm_epsilon,
            tie_word_embeddings=config.tie_embeddings,
        )
    ).eval()
    for parameter in peer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model = TransformerLanguageModel(config)
    model.load_state_dict(converted(peer.state_dict(), config.n_layer))
    return model, peer


def converted(theirs: dict[str, torch.Tensor], n_layer: int) -> dict[str, torch.Tensor]:
    """The weights of a Llama under our names."""
    ours = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "norm_f.weight": theirs["model.norm.weight"],
        "lm_head.weight": theirs["lm_head.weight"],
    }
    for i in range(n_layer):
        their, our = f"model.layers.{i}.", f"layers.{i}."
        layer = {k.removeprefix(their): v for k, v in theirs.items() if k.startswith(their)}
        qkv = [layer[f"self_attn.{name}_proj.weight"] for name in "qkv"]
        gate_up = [layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up")]
        ours |= {
            our + "norm.weight": layer["input_layernorm.weight"],
            our + "attention.qkv_proj.weight": torch.cat(qkv),
            our + "attention.out_proj.weight": layer["self_attn.o_proj.weight"],
            our + "mlp_norm.weight": layer["post_attention_layernorm.weight"],
            our + "mlp.gate_up_proj.weight": torch.cat(gate_up),
            our + "mlp.down_proj.weight": layer["mlp.down_proj.weight"],
        }
    return ours


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False, "d_mlp": 40}])
def test_same_logits_and_loss(fields):
    model, peer = make_pair(**fields)
    tokens = torch.randint(0, 96, (2, 130))
    expected = peer(tokens, labels=tokens)
    logits, _ = model(tokens)
    assert (logits - expected.logits).abs().max() < 1e-4
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_same_steps():
    model, peer = make_pair()
    tokens = torch.randint(0, 96, (2, 20))
    expected = peer(tokens).logits
    _, state = model.prefill(tokens[:, :7], max_length=20)
    for t in range(7, 20):
        assert (model.step(tokens[:, t], state) - expected[:, t]).abs().max() < 1e-4


def test_same_gradients():
    model, peer = make_pair()
    tokens = torch.randint(0, 96, (2, 17))
    peer(tokens, labels=tokens).loss.backward()
    model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
    theirs = {name: p.grad for name, p in peer.named_parameters()}
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    expected = converted(theirs, model.config.n_layer)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)
