"""`torch.export` and `torch.compile` of a whole model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.export import Dim

from mambakit.errors import CheckpointError
from mambakit.models import MambaConfig, MambaLanguageModel, load_exported

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


@torch.no_grad()
def test_a_file_in_a_process_that_has_not_made_it(tmp_path):
    """With states going in and out, whose types the file names."""
    model, tokens = make_model(), torch.randint(0, 96, (3, 9))
    _, state = model.prefill(tokens)
    shapes = {"tokens": {0: BATCH, 1: LENGTH}, "state": [[[{0: BATCH}, {0: BATCH}]] * 2]}
    program = torch.export.export(model, (tokens, state), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")

    tokens = torch.randint(0, 96, (5, 33))
    _, state = model.prefill(tokens)
    logits, _ = model(tokens, state)
    torch.save((tokens, state, logits), tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "from mambakit.models import load_exported\n"
        "program = load_exported(sys.argv[1]).module()\n"
        "tokens, state, logits = torch.load(sys.argv[2], weights_only=True)\n"
        "found, after = program(tokens, state)\n"
        "torch.testing.assert_close(found, logits)\n"
        "print(after.batch_size)\n"
    )
    files = (str(tmp_path / "model.pt2"), str(tmp_path / "expected.pt"))
    result = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, encoding="utf-8"
    )
    assert (result.returncode, result.stdout) == (0, "5\n"), result.stderr


def test_files_that_are_no_exported_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.pt2 is missing"):
        load_exported(tmp_path / "model.pt2")
    (tmp_path / "model.pt2").write_bytes(b"PK not a model")
    with pytest.raises(CheckpointError, match=r"model\.pt2 is damaged, or no exported program"):
        load_exported(tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recomputed", "backend"), [(False, "inductor"), (False, "aot_eager"), (True, "aot_eager")]
)
def test_compile_of_training(recomputed, backend):
    """Forward and backward as one graph each, for other sizes, with states between pieces of a text."""
    model = make_model(n_layer=1)
    model.activation_checkpointing = recomputed

    def loss(tokens, targets, state):
        return model.loss(tokens, targets, state=state)

    def step(loss, size):
        tokens = torch.arange(size[0] * size[1]).view(size) * 7 % 96
        model.zero_grad()
        first, state = loss(tokens, tokens, model.initial_state(size[0]))
        second, _ = loss(tokens, tokens, state.detach())
        (first + second).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return second.detach(), gradients

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for size in SIZES[1:]:
        expected, gradients = step(loss, size)
        found, own = step(compiled, size)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(own, gradients)
        assert all(gradient.abs().sum() > 0 for gradient in own.values())
