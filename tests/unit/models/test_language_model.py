from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mambakit.errors import ArgumentError, DtypeError, ShapeError
from mambakit.models import (
    PRESETS,
    MambaConfig,
    MambaLanguageModel,
    ModelState,
    Quantisation,
    quantise,
)

SMALL = {"d_model": 16, "n_layer": 3, "vocab_size": 50, "d_state": 4}


def make_model(**fields) -> MambaLanguageModel:
    torch.manual_seed(0)
    return MambaLanguageModel(MambaConfig(**{**SMALL, **fields}))


def make_tokens(batch: int = 2, seqlen: int = 9) -> torch.Tensor:
    return torch.randint(0, 50, (batch, seqlen), generator=torch.Generator().manual_seed(1))


def test_names_and_shapes_are_the_official_ones():
    model = make_model(n_layer=1)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "backbone.embedding.weight": (56, 16),
        "backbone.layers.0.mixer.A_log": (32, 4),
        "backbone.layers.0.mixer.D": (32,),
        "backbone.layers.0.mixer.conv1d.bias": (32,),
        "backbone.layers.0.mixer.conv1d.weight": (32, 1, 4),
        "backbone.layers.0.mixer.dt_proj.bias": (32,),
        "backbone.layers.0.mixer.dt_proj.weight": (32, 1),
        "backbone.layers.0.mixer.in_proj.weight": (64, 16),
        "backbone.layers.0.mixer.out_proj.weight": (16, 32),
        "backbone.layers.0.mixer.x_proj.weight": (9, 32),
        "backbone.layers.0.norm.weight": (16,),
        "backbone.norm_f.weight": (16,),
        "lm_head.weight": (56, 16),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_closed_form_number_of_parameters(name):
    with torch.device("meta"):
        model = MambaLanguageModel(PRESETS[name])
    assert model.num_parameters() == PRESETS[name].num_parameters()


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_embeddings": False, "bias": True, "conv_bias": False},
        {"selective": (), "dt_rank": 5},
        {"selective": ("B",), "A_init": "s4d-lin"},
        {"selective": ("dt", "C"), "A_init": "s4d-lin", "expand": 3, "d_conv": 2},
    ],
)
def test_closed_form_for_other_configs(fields):
    model = make_model(**fields)
    assert model.num_parameters() == model.config.num_parameters()


def test_tied_head_is_the_embedding():
    model = make_model()
    assert model.lm_head.weight is model.backbone.embedding.weight
    untied = make_model(tie_embeddings=False)
    assert untied.lm_head.weight is not untied.backbone.embedding.weight


def test_initial_values():
    model = make_model(d_model=64, n_layer=16, vocab_size=4000, bias=True)
    assert abs(model.backbone.embedding.weight.std() / 0.02 - 1) < 0.02
    assert abs(model.backbone.embedding.weight.mean()) < 1e-3
    mixer = model.backbone.layers[0].mixer
    bound = 128**-0.5 / 16**0.5  # kaiming uniform of out_proj, over the square root of the layers
    assert 0.99 * bound < mixer.out_proj.weight.abs().max() <= bound * 1.0001
    assert 0.99 * 64**-0.5 < mixer.in_proj.weight.abs().max() <= 64**-0.5
    assert not mixer.in_proj.bias.any()
    assert not mixer.out_proj.bias.any()
    assert mixer.dt_proj.bias.all()
    # An untrained model expects every token alike.
    loss, _ = model.loss(make_tokens(4, 64), make_tokens(4, 64).roll(1, dims=1))
    assert abs(loss - torch.tensor(4000.0).log()) < 0.2


def test_forward_in_parts_and_in_steps_equals_forward():
    model = make_model().double()
    tokens = make_tokens()
    whole, last = model(tokens)
    first, state = model(tokens[:, :4])
    kept = state.clone()
    second, end = model(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-10, atol=1e-12)
    for new, old, same in zip(end.layers, last.layers, state.layers, strict=True):
        torch.testing.assert_close(new.ssm_state, old.ssm_state, rtol=1e-10, atol=1e-12)
        assert not torch.equal(same.ssm_state, new.ssm_state)
    for same, copy in zip(state.layers, kept.layers, strict=True):  # a forward leaves it alone
        assert torch.equal(same.ssm_state, copy.ssm_state)

    stepped = model.initial_state(2)
    outputs = [model.step(tokens[:, t], stepped) for t in range(9)]
    torch.testing.assert_close(torch.stack(outputs, dim=1), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 9, 100])
def test_prefill_in_chunks(chunk):
    model = make_model().double()
    tokens = make_tokens()
    whole, last = model(tokens)
    logits, state = model.prefill(tokens, chunk=chunk)
    torch.testing.assert_close(logits, whole[:, -1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        state.layers[2].ssm_state, last.layers[2].ssm_state, rtol=1e-10, atol=1e-12
    )
    assert not logits.requires_grad


@pytest.mark.parametrize("seqlen", [1, 9])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bias": True},
        {"block": "h3"},
        {"block": "ungated", "bias": True},
        {"A_init": "s4d-lin", "n_layer": 1},
    ],
    ids=str,
)
def test_the_last_position_alone(fields, seqlen):
    model = make_model(**fields).double()
    tokens = make_tokens(2, seqlen)
    _, before = model(tokens)
    whole, expected = model.hidden(tokens, before)
    last, found = model.hidden(tokens, before, only_last=True)
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-10, atol=1e-12)
    for ours, truth in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours.conv_state, truth.conv_state, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.ssm_state, truth.ssm_state, rtol=1e-10, atol=1e-12)


def test_the_last_position_alone_of_a_quantised_model():
    model = make_model(d_model=64)
    quantise(model, Quantisation(bits=8))
    whole, _ = model.hidden(make_tokens())
    last, _ = model.hidden(make_tokens(), only_last=True)
    torch.testing.assert_close(last, whole[:, -1:])


MIXERS = [
    {},
    {"bias": True},
    {"d_conv": 1},
    {"selective": ("B",)},
    {"mixer_norm_epsilon": 1e-5},
    {"block": "h3"},
    {"block": "ungated"},
    {"A_init": "s4d-lin"},
]


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("chunk", [2, 5, 100])
@pytest.mark.parametrize("fields", MIXERS, ids=str)
def test_prompts_of_any_length_are_read_together(fields, chunk, continues):
    model = make_model(**fields).double()
    lengths = torch.tensor([1, 2, 3, 4, 5, 11, 12])
    tokens, before = make_tokens(7, 12), model(make_tokens(7, 2))[1] if continues else None
    logits, state = model.prefill(tokens, before, lengths=lengths, chunk=chunk)
    for row, length in enumerate(lengths.tolist()):
        start = None if before is None else before.select(torch.tensor([row]))
        alone, expected = model.prefill(tokens[row : row + 1, :length], start)
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-10, atol=1e-12)
        found = state.select(torch.tensor([row]))
        for ours, truth in zip(found.layers, expected.layers, strict=True):
            torch.testing.assert_close(ours.conv_state, truth.conv_state, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(ours.ssm_state, truth.ssm_state, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_padding_moves_no_state(dtype):
    model = make_model().to(dtype)
    tokens = make_tokens(1, 40)
    _, state = model.prefill(tokens, lengths=torch.tensor([9]))
    _, longer = model.prefill(tokens[:, :30], lengths=torch.tensor([9]))
    for ours, truth in zip(state.layers, longer.layers, strict=True):
        torch.testing.assert_close(ours.conv_state, truth.conv_state)
        torch.testing.assert_close(ours.ssm_state, truth.ssm_state)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([0, 3]), ArgumentError, "got 0 to 3, wanted 1 to 9"),
        (torch.tensor([1, 10]), ArgumentError, "got 1 to 10, wanted 1 to 9"),
        (torch.tensor([1]), ShapeError, r"got shape \(1,\), wanted \(2,\)"),
        (torch.tensor([1.0, 2.0]), DtypeError, "wanted int32 or int64"),
    ],
)
def test_lengths_that_do_not_fit(lengths, error, message):
    with pytest.raises(error, match=f"lengths: .*{message}"):
        make_model().prefill(make_tokens(), lengths=lengths)


def test_of_a_prompt_the_last_layer_makes_one_output():
    model = make_model(n_layer=2)
    rows = []
    record = lambda module, args, out: rows.append(args[0].numel() // args[0].shape[-1])  # noqa: E731
    for layer in model.backbone.layers:
        layer.mixer.out_proj.register_forward_hook(record)
    model.prefill(make_tokens(2, 9))
    assert rows == [18, 2]


def test_packed_documents_do_not_see_one_another():
    model = make_model().double()
    tokens = make_tokens(1, 12)
    seq_idx = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    packed, state = model(tokens, seq_idx=seq_idx)
    separate = [model(part)[0] for part in tokens.split([5, 4, 3], dim=1)]
    torch.testing.assert_close(packed, torch.cat(separate, dim=1), rtol=1e-10, atol=1e-12)
    _, alone = model(tokens[:, 9:])
    torch.testing.assert_close(state.layers[1].ssm_state, alone.layers[1].ssm_state)
    assert not torch.allclose(packed, model(tokens)[0])


def test_loss_is_the_cross_entropy_of_the_logits():
    model = make_model()
    tokens, targets = make_tokens(), make_tokens().roll(1)
    targets[0, :3] = -100
    loss, state = model.loss(tokens, targets)
    expected = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    after, _ = model.loss(tokens, targets, state=state)
    logits, _ = model(tokens, state)
    torch.testing.assert_close(after, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def gradients(model: MambaLanguageModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(make_tokens(), make_tokens().roll(1))[0].backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_activation_checkpointing_changes_no_gradient():
    model = make_model()
    plain = gradients(model)
    assert not model.activation_checkpointing
    model.activation_checkpointing = True
    calls = []
    # Before the forward: the second one ends as soon as it has made what the backward needs.
    model.backbone.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = gradients(model)
    assert len(calls) == 2
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_recomputation_is_that_of_every_mixer():
    model = make_model()
    mixers = [block.mixer for block in model.backbone.layers]
    assert len(mixers) > 1
    assert model.recomputation
    model.recomputation = False
    assert not any(mixer.recomputes for mixer in mixers)
    mixers[0].recomputes = True
    assert not model.recomputation
    model.recomputation = True
    assert all(mixer.recomputes for mixer in mixers)


def test_activation_checkpointing_leaves_the_generators_alone(monkeypatch):
    """Their state cannot be read while a CUDA graph is captured; without dropout nobody draws."""
    model = make_model()
    model.activation_checkpointing = True
    with monkeypatch.context() as context:
        context.setattr(torch, "get_rng_state", lambda: pytest.fail("the state was read"))
        gradients(model)
    model.backbone.layers[0].mixer.out_proj = torch.nn.Sequential(
        model.backbone.layers[0].mixer.out_proj, torch.nn.Dropout(0.5)
    )
    read = []
    monkeypatch.setattr(
        torch, "get_rng_state", lambda: read.append(1) or torch.random.get_rng_state()
    )
    gradients(model)
    assert read


def test_half_precision_keeps_the_residual_stream_in_float32():
    model = make_model()
    exact, _ = model(make_tokens())
    seen = []
    model.backbone.layers[2].register_forward_hook(lambda _, inputs, __: seen.append(inputs[1]))
    logits, _ = model.bfloat16()(make_tokens())
    assert logits.dtype == torch.bfloat16
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.02)


def test_autocast_keeps_the_residual_stream_in_float32():
    model = make_model()
    exact, _ = model(make_tokens())
    seen = []
    model.backbone.layers[2].register_forward_hook(lambda _, inputs, __: seen.append(inputs[1]))
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(make_tokens())
        loss, _ = model.loss(make_tokens(), make_tokens())
        last, state = model.prefill(make_tokens())
        next_logits = model.step(make_tokens()[:, 0], state)
    assert seen[0].dtype == torch.float32
    assert logits.dtype == last.dtype == next_logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.02)
    expected = F.cross_entropy(exact.flatten(0, 1), make_tokens().flatten())
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0.01)
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("fields", [{}, {"A_init": "s4d-lin"}])
def test_compiles_as_one_graph(fields):
    model = make_model(n_layer=2, **fields)
    tokens = make_tokens(2, 3)  # The reference, which complex A runs, is unrolled in time.

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return model.loss(tokens, tokens)[0]

    expected, _ = model(tokens)
    gradient = torch.autograd.grad(loss(tokens), model.backbone.embedding.weight)[0]
    torch.compiler.reset()
    logits, state = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens)
    torch.testing.assert_close(logits, expected)
    assert isinstance(state, ModelState)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(tokens)
    (compiled_gradient,) = torch.autograd.grad(compiled, model.backbone.embedding.weight)
    torch.testing.assert_close(compiled_gradient, gradient)


def test_model_state_helpers():
    model = make_model()
    _, state = model.prefill(make_tokens(3))
    assert state.batch_size == 3
    ssm = state.layers[2].ssm_state.clone()
    both = ModelState.cat([state.select(torch.tensor([2])), state.select(torch.tensor([0, 1]))])
    assert torch.equal(both.layers[2].ssm_state, ssm[[2, 0, 1]])
    copy = state.clone()
    copy.reset()
    assert torch.equal(state.layers[2].ssm_state, ssm)
    for layer, fresh in zip(copy.layers, model.initial_state(3).layers, strict=True):
        assert torch.equal(layer.ssm_state, fresh.ssm_state)
        assert torch.equal(layer.conv_state, fresh.conv_state)
    assert state.to("meta").layers[0].ssm_state.device.type == "meta"
    _, with_gradient = model(make_tokens(3))
    assert with_gradient.layers[0].ssm_state.requires_grad
    assert not with_gradient.detach().layers[0].ssm_state.requires_grad


def test_flops_per_token():
    # d_model 16, d_inner 32, d_state 4, dt_rank 1, head 56 x 16
    layer = 16 * 64 + 32 * 4 + 32 * 9 + 32 + 32 * 16
    expected = 6 * (3 * layer + 56 * 16) + 3 * 7 * 3 * 32 * 4
    assert make_model().flops_per_token(1024) == expected
    assert make_model(tie_embeddings=False).flops_per_token(1) == expected
    frozen = make_model().requires_grad_(False)
    assert frozen.flops_per_token(1) == 4 * (3 * layer + 56 * 16) + 3 * 7 * 3 * 32 * 4


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.tensor([[1, 50]]), ArgumentError, "got id 50, wanted 0 <= id < 50"),
        (torch.tensor([[-1, 60]]), ArgumentError, "got id -1, wanted 0 <= id < 50"),
        (torch.tensor([[1.0]]), DtypeError, r"got dtype torch\.float32, wanted int32 or int64"),
        (torch.tensor([1, 2]), ShapeError, r"got shape \(2,\), wanted \(B, L\)"),
        (torch.zeros(2, 0, dtype=torch.int64), ShapeError, r"got shape \(2, 0\), wanted \(B, L\)"),
    ],
)
def test_wrong_tokens(tokens, error, message):
    model = make_model()
    for call in (model, model.hidden, model.prefill, lambda tokens: model.loss(tokens, tokens)):
        with pytest.raises(error, match=message):
            call(tokens)


def test_wrong_steps_and_states():
    model = make_model()
    state = model.initial_state(2)
    with pytest.raises(ArgumentError, match="got id 50"):
        model.step(torch.tensor([1, 50]), state)
    with pytest.raises(ShapeError, match=r"got shape \(1, 2\), wanted \(B,\)"):
        model.step(torch.tensor([[1, 2]]), state)
    with pytest.raises(ShapeError, match="state: got 2 sequences, wanted 3 like tokens"):
        model.step(torch.tensor([1, 2, 3]), state)
    with pytest.raises(ShapeError, match="state: got 2 layers, wanted the model's 3"):
        model(make_tokens(), make_model(n_layer=2).initial_state(2))
    with pytest.raises(ArgumentError, match="chunk: got 0, wanted at least 1"):
        model.prefill(make_tokens(), chunk=0)


def test_int32_tokens_and_an_empty_batch():
    model = make_model()
    assert torch.equal(model(make_tokens().int())[0], model(make_tokens())[0])
    logits, state = model(torch.zeros(0, 3, dtype=torch.int64))
    assert logits.shape == (0, 3, 56)
    assert state.batch_size == 0
