"""`torch.export` and `torch.compile` of a whole model."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

from mambakit.models import MambaConfig, MambaLanguageModel

pytestmark = pytest.mark.filterwarnings("ignore")  # The compiler's own.

VARIANTS = {
    "default": {},
    "norms": {"mixer_norm_epsilon": 1e-6},
    "ablation": {"selective": ("dt",), "tie_embeddings": False, "bias": True},
    "complex": {"A_init": "s4d-lin"},
}


def make_model(**fields) -> MambaLanguageModel:
    config = MambaConfig(**{"d_model": 24, "n_layer": 2, "vocab_size": 96, **fields})
    return MambaLanguageModel(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_export(fields, strict):
    model, tokens = make_model(**fields), torch.randint(0, 96, (2, 9))
    program = torch.export.export(model, (tokens,), strict=strict)
    logits, state = program.module()(tokens)
    expected, expected_state = model(tokens)
    assert logits.equal(expected)
    for layer, other in zip(state.layers, expected_state.layers, strict=True):
        assert layer.ssm_state.equal(other.ssm_state)
        assert layer.conv_state.equal(other.conv_state)


BATCH, LENGTH = Dim("batch", min=2, max=32), Dim("length", min=4, max=4096)
SIZES = ((2, 4), (3, 9), (5, 33))


@torch.no_grad()
def test_export_of_any_batch_and_length():
    model, tokens = make_model(), torch.randint(0, 96, (3, 9))
    _, state = model.prefill(tokens)
    shapes = {"tokens": {0: BATCH, 1: LENGTH}, "state": [[[{0: BATCH}, {0: BATCH}]] * 2]}
    program = torch.export.export(model, (tokens, state), dynamic_shapes=shapes).module()
    for size in SIZES:
        tokens = torch.randint(0, 96, size)
        _, state = model.prefill(tokens)
        torch.testing.assert_close(program(tokens, state)[0], model(tokens, state)[0])


@torch.no_grad()
def test_export_to_a_file_and_back(tmp_path):
    model, tokens = make_model(), torch.randint(0, 96, (3, 9))
    shapes = {"tokens": {0: BATCH, 1: LENGTH}}
    program = torch.export.export(model, (tokens,), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in SIZES:
        tokens = torch.randint(0, 96, size)
        logits, state = loaded(tokens)
        expected, other = model(tokens)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(state.layers[1].ssm_state, other.layers[1].ssm_state)


@pytest.mark.slow
@torch.no_grad()
def test_compile_of_a_prompt_and_of_a_step():
    model, tokens = make_model(n_layer=1), torch.randint(0, 96, (2, 9))
    torch.compiler.reset()
    logits, state = torch.compile(model, fullgraph=True)(tokens)
    expected, other = model(tokens)
    torch.testing.assert_close(logits, expected)
    step = torch.compile(model.step, fullgraph=True)
    torch.testing.assert_close(step(tokens[:, 0], state), model.step(tokens[:, 0], other))
    torch.testing.assert_close(state.layers[0].ssm_state, other.layers[0].ssm_state)
