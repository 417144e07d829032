from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mambakit.errors import ArgumentError, ConfigError, DtypeError, ShapeError
from mambakit.models import (
    PRESETS,
    TRANSFORMER_PRESETS,
    TransformerConfig,
    TransformerLanguageModel,
)

SMALL = {"d_model": 24, "n_layer": 3, "n_head": 2, "vocab_size": 50}


def make_model(**fields) -> TransformerLanguageModel:
    torch.manual_seed(0)
    return TransformerLanguageModel(TransformerConfig(**{**SMALL, **fields}))


def make_tokens(batch: int = 2, seqlen: int = 9) -> torch.Tensor:
    return torch.randint(0, 50, (batch, seqlen), generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", TRANSFORMER_PRESETS)
def test_presets_have_the_closed_form_number_of_parameters(name):
    config = TRANSFORMER_PRESETS[name]
    with torch.device("meta"):
        model = TransformerLanguageModel(config)
    assert model.num_parameters() == config.num_parameters()


def test_presets_are_as_large_as_mamba():
    """The heads and widths are those of Table 12; each has nearly the size of its counterpart."""
    for name, mamba in zip(TRANSFORMER_PRESETS, PRESETS.values(), strict=True):
        ratio = TRANSFORMER_PRESETS[name].num_parameters() / mamba.num_parameters()
        assert 0.94 < ratio < 1.06, name
    shapes = [(c.n_layer, c.d_model, c.n_head, c.d_head) for c in TRANSFORMER_PRESETS.values()]
    assert shapes[:4] == [
        (12, 768, 12, 64), (24, 1024, 16, 64), (24, 1536, 16, 96), (24, 2048, 32, 64)
    ]  # fmt: skip
    assert TRANSFORMER_PRESETS["125m"].resolved_d_mlp == 2048
    assert TRANSFORMER_PRESETS["1.3b"].resolved_d_mlp == 5504


def test_untied_head_and_given_mlp_width():
    model = make_model(tie_embeddings=False, d_mlp=40)
    assert model.num_parameters() == model.config.num_parameters()
    assert model.lm_head.weight is not model.embedding.weight
    assert model.layers[0].mlp.down_proj.weight.shape == (24, 40)


def test_initial_values():
    model = make_model(d_model=128, n_layer=8, n_head=4, vocab_size=2000)
    block = model.layers[0]
    assert abs(model.embedding.weight.std() / 0.02 - 1) < 0.02
    assert abs(block.attention.qkv_proj.weight.std() / 0.02 - 1) < 0.02
    assert abs(block.mlp.down_proj.weight.std() / (0.02 / 4) - 1) < 0.02
    loss, _ = model.loss(make_tokens(4, 64), make_tokens(4, 64).roll(1, dims=1))
    assert abs(loss - torch.tensor(2000.0).log()) < 0.1


def test_the_future_does_not_matter():
    model = make_model().double()
    tokens = make_tokens()
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 50
    logits, _ = model(tokens)
    changed, _ = model(other)
    close(changed[:, :5], logits[:, :5])
    assert (changed[:, 5:] - logits[:, 5:]).abs().min(-1).values.max() > 0


def test_positions_matter():
    model = make_model().double()
    logits, _ = model(torch.tensor([[3, 7, 5], [7, 3, 5]]))
    assert not torch.allclose(logits[0, -1], logits[1, -1])


def test_forward_in_parts_and_in_steps_equals_forward():
    model = make_model().double()
    tokens = make_tokens()
    whole, last = model(tokens)
    assert int(last.position) == last.max_length == 9

    start = model.initial_state(2, 12)
    first, between = model(tokens[:, :4], start)
    kept = between.clone()
    second, end = model(tokens[:, 4:], between)
    close(torch.cat([first, second], dim=1), whole)
    assert (int(start.position), int(between.position), int(end.position)) == (0, 4, 9)
    for new, same, copy in zip(end.layers, between.layers, kept.layers, strict=True):
        assert torch.equal(same.keys, copy.keys)  # a forward leaves its state alone
        assert not torch.equal(same.keys, new.keys)
    for ours, expected in zip(end.layers, last.layers, strict=True):
        close(ours.keys[:, :, :9], expected.keys)
        close(ours.values[:, :, :9], expected.values)
        assert not ours.values[:, :, 9:].any()

    stepped = model.initial_state(2, 12)
    outputs = [model.step(tokens[:, t], stepped) for t in range(9)]
    close(torch.stack(outputs, dim=1), whole)
    assert int(stepped.position) == 9


def test_what_is_behind_the_position_is_not_read():
    model = make_model().double()
    tokens = make_tokens()
    expected, _ = model(tokens)
    state = model.initial_state(2, 9)
    model.step(tokens[:, 3], state)
    for layer in state.layers:
        layer.keys.fill_(3.0)
        layer.values.fill_(1e6)
    state.reset()
    outputs = [model.step(tokens[:, t], state) for t in range(9)]
    close(torch.stack(outputs, dim=1), expected)


def test_prefill_then_steps():
    model = make_model().double()
    tokens = make_tokens()
    whole, _ = model(tokens)
    logits, state = model.prefill(tokens[:, :5], max_length=9)
    close(logits, whole[:, 4])
    assert state.max_length == 9
    assert not logits.requires_grad
    for t in range(5, 9):
        logits = model.step(tokens[:, t], state)
        close(logits, whole[:, t])
    continued, _ = model.prefill(tokens[:, 5:], model.prefill(tokens[:, :5], max_length=9)[1])
    close(continued, whole[:, -1])


def test_loss_is_the_cross_entropy_of_the_logits():
    model = make_model()
    tokens, targets = make_tokens(), make_tokens().roll(1)
    targets[0, :3] = -100
    loss, state = model.loss(tokens, targets)
    expected = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    assert not state.layers[0].keys.requires_grad


def test_the_loss_falls():
    model = make_model()
    tokens = make_tokens(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - 3.9) < 0.3
    assert losses[-1] < 1.5


def test_autocast_keeps_the_residual_stream_in_float32():
    model = make_model()
    exact, _ = model(make_tokens())
    seen = []
    model.layers[2].mlp.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(make_tokens())
        loss, _ = model.loss(make_tokens(), make_tokens())
        state = model.initial_state(2, 12)
        model.prefill(make_tokens(), state)
        next_logits = model.step(make_tokens()[:, 0], state)
    assert seen[0] == torch.bfloat16
    assert state.layers[0].keys.dtype == torch.bfloat16
    assert logits.dtype == next_logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.02)
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_compiles_as_one_graph():
    model = make_model(n_layer=2)
    tokens = make_tokens(2, 5)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return model.loss(tokens, tokens)[0]

    expected, _ = model(tokens)
    gradient = torch.autograd.grad(loss(tokens), model.embedding.weight)[0]
    torch.compiler.reset()
    logits, _ = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens)
    torch.testing.assert_close(logits, expected)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(tokens)
    (compiled_gradient,) = torch.autograd.grad(compiled, model.embedding.weight)
    torch.testing.assert_close(compiled_gradient, gradient)


def test_flops_per_token():
    layer = 4 * 24 * 24 + 3 * 24 * 128
    expected = 6 * (3 * layer + 56 * 24) + 3 * 6 * 100 * 24
    assert make_model().flops_per_token(100) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_head": 5}, "n_head is 5, not a divisor of d_model / 2 = 12"),
        ({"n_head": 24}, "n_head is 24, not a divisor"),
        ({"n_layer": 0}, "n_layer is 0, not at least 1"),
        ({"d_mlp": 0}, 'd_mlp is 0, not "auto" or at least 1'),
        ({"rope_theta": 0.0}, "rope_theta is 0.0, not a positive number"),
    ],
)
def test_wrong_config(fields, message):
    with pytest.raises(ConfigError, match=message):
        TransformerConfig(**{**SMALL, **fields})


def test_wrong_arguments():
    model = make_model()
    state = model.initial_state(2, 4)
    with pytest.raises(DtypeError, match="tokens: got dtype"):
        model(torch.zeros(1, 2))
    with pytest.raises(ShapeError, match=r"got shape \(2,\), wanted \(B, L\)"):
        model(torch.tensor([1, 2]))
    with pytest.raises(ShapeError, match="state: got 2 sequences, wanted 3"):
        model.step(make_tokens(3)[:, 0], state)
    with pytest.raises(ArgumentError, match="state: has room for 4 tokens, wanted 5"):
        model(make_tokens(2, 5), state)
    _, full = model.prefill(make_tokens(2, 4), state)
    with pytest.raises(ArgumentError, match="state: has room for 4 tokens, wanted 5"):
        model.step(make_tokens()[:, 0], full)
    with pytest.raises(ArgumentError, match="max_length: got 3, wanted at least the 9"):
        model.prefill(make_tokens(), max_length=3)
