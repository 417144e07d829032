from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mambakit.errors import ArgumentError, ShapeError
from mambakit.models import (
    MambaConfig,
    MambaLanguageModel,
    ModelState,
    Quantisation,
    fused_step,
    quantise,
)
from mambakit.ops.cpu import model_step as ops
from mambakit.ops.cpu.kernels.model_step import task_units
from mambakit.ops.cpu.model_step import UNIT
from mambakit.ops.model_layer import Layer

CPU = torch.device("cpu")
SMALL = {"d_model": 24, "n_layer": 3, "vocab_size": 300}


def make_model(**fields) -> MambaLanguageModel:
    torch.manual_seed(0)
    model = MambaLanguageModel(MambaConfig(**{**SMALL, **fields}))
    for parameter in model.parameters():  # equal rows and values would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def read(model: MambaLanguageModel, batch: int) -> tuple[torch.Tensor, ModelState]:
    """Tokens to go on with, (B, 5), and the state after a prompt."""
    tokens = torch.randint(0, 300, (batch, 9), generator=torch.Generator().manual_seed(1))
    return tokens[:, 4:], model.prefill(tokens[:, :4])[1]


@torch.no_grad()
def by_modules(model: MambaLanguageModel, tokens: torch.Tensor, state: ModelState) -> torch.Tensor:
    return model.lm_head(model.backbone.step(tokens, state))


def fused(model: MambaLanguageModel, tokens: torch.Tensor, state: ModelState) -> torch.Tensor:
    step = fused_step.fused_step(model, tokens.device, state)
    assert step is not None
    with torch.no_grad():
        return step(tokens)


def assert_same_state(state: ModelState, expected: ModelState, **tolerance: float) -> None:
    for layer, other in zip(state.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.conv_state, other.conv_state, **tolerance)
        torch.testing.assert_close(layer.ssm_state, other.ssm_state, **tolerance)


CONFIGS = {
    "default": {},
    "untied": {"tie_embeddings": False},
    "odd sizes": {"d_model": 17, "d_state": 5, "d_conv": 2, "dt_rank": 3, "expand": 3},
    "no taps before, one state": {"d_conv": 1, "d_state": 1, "dt_rank": 1},
    "several tasks a phase": {"d_model": 96, "vocab_size": 1000},
    "norms": {"mixer_norm_epsilon": 0.01, "dt_rank": 3, "d_state": 5},
    "norms, several tasks a phase": {"mixer_norm_epsilon": 1e-6, "d_model": 96},
    "s4d constant": {"A_init": "constant", "norm_epsilon": 1e-2},
}


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_it_equals_the_modules(fields, batch):
    model = make_model(**fields)
    tokens, state = read(model, batch)
    expected_state = state.clone()
    for t in range(tokens.shape[1]):
        logits = fused(model, tokens[:, t], state)
        expected = by_modules(model, tokens[:, t], expected_state)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert_same_state(state, expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "name", ["default", "untied", "odd sizes", "several tasks a phase", "norms"]
)
def test_quantised_it_equals_the_modules(name, bits, group_size, batch):
    model = make_model(**CONFIGS[name])
    quantise(model, Quantisation(bits=bits, group_size=group_size))
    tokens, state = read(model, batch)
    expected_state = state.clone()
    for t in range(tokens.shape[1]):
        logits = fused(model, tokens[:, t], state)
        expected = by_modules(model, tokens[:, t], expected_state)
        # Both round what is between matrices to 16 bits; float32 roundings before it can shift a code by one.
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert_same_state(state, expected_state, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "name", ["default", "untied", "odd sizes", "no taps before, one state", "norms"]
)
def test_bfloat16_is_as_near_to_float32_as_the_modules(name, batch):
    model = make_model(**CONFIGS[name]).bfloat16()
    wide = copy.deepcopy(model).float()
    tokens, state = read(model, batch)
    wide_state, module_state = read(wide, batch)[1], state.clone()
    ours = theirs = 0.0
    for t in range(tokens.shape[1]):
        exact = fused(wide, tokens[:, t], wide_state)
        logits = fused(model, tokens[:, t], state)
        expected = by_modules(model, tokens[:, t], module_state)
        assert logits.dtype == torch.bfloat16
        ours += float((logits - exact).norm())
        theirs += float((expected - exact).norm())
        assert (logits - exact).norm() < 0.03 * exact.norm()
    assert (
        ours <= 1.2 * theirs
    )  # what both round, the prompt's state and the logits, is a part of it
    assert state.layers[0].conv_state.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["float32", "bfloat16", "8", "4"])
def test_a_row_does_not_depend_on_the_others_nor_on_the_threads(form):
    model = make_model(d_model=96, n_layer=4, vocab_size=1000)
    if form == "bfloat16":
        model.bfloat16()
    elif form != "float32":
        quantise(model, Quantisation(bits=int(form)))
    tokens, state = read(model, 7)
    alone = [state.select(torch.tensor([row])) for row in range(7)]
    before = torch.get_num_threads()
    try:
        for t, threads in enumerate((1, 2, 3, 5)):
            torch.set_num_threads(threads)
            logits = model.step(tokens[:, t], state)
            for row in range(7):
                assert torch.equal(logits[row], model.step(tokens[row : row + 1, t], alone[row])[0])
    finally:
        torch.set_num_threads(before)
    assert_same_state(state, ModelState.cat(alone), rtol=0, atol=0)


def test_new_weights_are_seen():
    model = make_model()
    tokens, state = read(model, 2)
    fused(model, tokens[:, 0], state.clone())
    other = make_model(A_init="random")
    model.load_state_dict(other.state_dict(), assign=True)
    model.backbone.layers[1].mixer.in_proj.weight.data = torch.randn(96, 24)
    expected = by_modules(model, tokens[:, 0], state.clone())
    torch.testing.assert_close(fused(model, tokens[:, 0], state), expected, rtol=1e-5, atol=1e-5)


def test_states_count_as_changed():
    model = make_model()
    tokens, state = read(model, 1)
    versions = [layer.ssm_state._version for layer in state.layers]
    fused(model, tokens[:, 0], state)
    assert all(
        layer.ssm_state._version > v for layer, v in zip(state.layers, versions, strict=True)
    )


class Adapted(nn.Module):
    """What LoRA puts in the place of a projection."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 1


def adapt(model: MambaLanguageModel, name: str) -> None:
    mixer = model.backbone.layers[1].mixer
    setattr(mixer, name, Adapted(getattr(mixer, name)))


def replace_forward(model: MambaLanguageModel) -> None:
    layer = model.backbone.layers[2].mixer.out_proj
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1


def use_strided_weight(model: MambaLanguageModel) -> None:
    weight = model.backbone.layers[0].mixer.out_proj.weight
    weight.data = weight.data.t().contiguous().t()


CHANGES: dict[str, Callable[[MambaLanguageModel], object]] = {
    "adapter of in_proj": lambda model: adapt(model, "in_proj"),
    "adapter of x_proj": lambda model: adapt(model, "x_proj"),
    "adapted head": lambda model: setattr(model, "lm_head", Adapted(model.lm_head)),
    "hook": lambda model: model.backbone.layers[2].mixer.x_proj.register_forward_hook(
        lambda _, __, out: out + 1
    ),
    "hook before": lambda model: model.backbone.layers[0].mixer.out_proj.register_forward_pre_hook(
        lambda _, inputs: (inputs[0] + 1,)
    ),
    "other forward": replace_forward,
    "bfloat16 norm": lambda model: model.backbone.layers[1].norm.bfloat16(),
    "float64": lambda model: model.double(),
    "strided weight": use_strided_weight,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_not_plain_is_left_to_the_modules(change):
    model = make_model()
    change(model)
    tokens, state = read(model, 2)
    assert fused_step.fused_step(model, CPU, state) is None
    expected = by_modules(model, tokens[:, 0], state.clone())
    assert torch.equal(model.step(tokens[:, 0], state), expected)


@pytest.mark.parametrize(
    "fields",
    [{"bias": True}, {"conv_bias": False}, {"A_init": "s4d-lin"}, {"selective": ("dt", "B")}],
)
def test_other_configs_are_left_to_the_modules(fields):
    model = make_model(**fields)
    tokens, state = read(model, 2)
    assert fused_step.fused_step(model, CPU, state) is None
    assert model.step(tokens[:, 0], state).isfinite().all()


def test_autocast_is_left_to_the_modules():
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        _, state = read(model, 2)
        assert fused_step.fused_step(model, CPU, state) is None


def mixer_alone(model: MambaLanguageModel, state: ModelState) -> Layer:
    """The tensors of the second layer's mixer."""
    layers = fused_step._modules(list(model.backbone.blocks())[1]), state.layers[1]
    return fused_step._layer(*layers)._replace(norm=torch.empty(0))


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "fields", [{}, {"d_model": 96}, {"d_model": 17, "d_state": 5, "d_conv": 2}]
)
def test_a_mixer_alone(fields, batch):
    model = make_model(**fields)
    _, state = read(model, batch)
    expected_state = state.clone()
    for _ in range(3):
        hidden = torch.randn(batch, model.config.d_model)
        found = ops.mixer_step(mixer_alone(model, state), hidden)
        expected = model.backbone.layers[1].mixer.step(hidden, expected_state.layers[1])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert_same_state(state, expected_state, rtol=1e-5, atol=1e-5)


def test_a_mixer_of_other_tensors_is_left_to_its_operations():
    model = make_model()
    _, state = read(model, 2)
    mixer, hidden = mixer_alone(model, state), torch.randn(2, 24)
    before = state.clone()
    strided = mixer.x_proj.detach().t().contiguous().t()
    assert ops.mixer_step(mixer, hidden.bfloat16()) is None
    assert ops.mixer_step(mixer._replace(x_proj=strided), hidden) is None
    assert ops.mixer_step(mixer._replace(D=mixer.D.detach().double()), hidden) is None
    assert_same_state(state, before, rtol=0, atol=0)


@pytest.mark.parametrize("units", [1, 2, 3, 48, 3143])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_tasks_cover_all_units_and_shrink(units: int, threads: int) -> None:
    tasks, last = [], 0
    while last < units:
        first, end = task_units(len(tasks), units, threads)
        assert first == last < end
        tasks.append(end - first)
        last = end
    assert tasks == sorted(tasks, reverse=True)
    assert tasks[0] == -(-units // (2 * threads))
    assert tasks[-1] == 1
    first, end = task_units(len(tasks), units, threads)
    assert first == end


def test_who_waits_for_a_slow_thread_sleeps_and_goes_on(monkeypatch):
    model = make_model(d_model=96, vocab_size=1000)
    tokens, state = read(model, 1)
    expected = fused(model, tokens[:, 0], state.clone())
    naps = []

    def run(walk, threads, *args):
        head, rows, claimed, done = args[-4:]
        claimed[-1] = 1  # the first task of the head, by another thread
        _, units = task_units(0, -(-model.config.vocab_size // UNIT), threads)
        first_rows = units * UNIT

        def sleep(seconds: float) -> None:
            naps.append(seconds)
            if len(naps) == 3:
                rows.logits[:, :first_rows] = rows.normed.values @ head[:first_rows].T
                done[-1] += units

        monkeypatch.setattr(time, "sleep", sleep)
        walk(0, 1, *args)

    monkeypatch.setattr(ops, "run", run)
    logits = fused(model, tokens[:, 0], state)
    assert len(naps) == 3
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "8", "modules"])
def test_a_prepared_step_is_the_step(form):
    model = make_model(bias=form == "modules")
    if form == "bfloat16":
        model.bfloat16()
    elif form == "8":
        quantise(model, Quantisation(bits=8))
    tokens, state = read(model, 3)
    other = state.clone()
    step = model.prepared_step(state)
    for t in range(tokens.shape[1]):
        assert torch.equal(step(tokens[:, t]), model.step(tokens[:, t], other))
    assert_same_state(state, other, rtol=0, atol=0)


def test_a_prepared_step_looks_at_its_tokens_and_keeps_no_logits():
    model = make_model()
    tokens, state = read(model, 2)
    step = model.prepared_step(state)
    first = step(tokens[:, 0])
    kept = first.clone()
    step(tokens[:, 1])
    assert torch.equal(first, kept)
    with pytest.raises(ArgumentError, match="got id 300"):
        step(torch.tensor([1, 300]))
    with pytest.raises(ShapeError, match="got 2 sequences, wanted 3"):
        step(torch.tensor([1, 2, 3]))
