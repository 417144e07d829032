"""Quantised models on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import error

from mambakit.models import MambaConfig, MambaLanguageModel, Quantisation, quantise
from mambakit.nn.quantised_linear import QuantisedEmbedding, QuantisedLinear
from mambakit.ops.quantisation import dequantise

pytestmark = pytest.mark.gpu


def make_models(bits: int) -> tuple[MambaLanguageModel, MambaLanguageModel]:
    """A quantised model, and the float64 model that it stands for, on the CPU."""
    torch.manual_seed(0)
    exact = MambaLanguageModel(MambaConfig(d_model=96, n_layer=2, vocab_size=1000))
    small = copy.deepcopy(exact)
    quantise(small, Quantisation(bits=bits))
    names = dict(small.named_modules(remove_duplicate=False))
    for name, module in exact.named_modules():
        found = names[name]
        table = found.table if isinstance(found, QuantisedEmbedding) else found
        if isinstance(table, QuantisedLinear):
            module.weight.data = dequantise(table.matrix, torch.float32)
    return small, exact.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 12])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_prompts_and_steps(bits: int, batch: int, dtype: torch.dtype) -> None:
    small, exact = make_models(bits)
    rounded = copy.deepcopy(exact).to("cuda", dtype)
    small.to("cuda", dtype)
    assert small.lm_head is small.backbone.embedding.table
    assert small.lm_head.codes.is_cuda
    tokens = torch.randint(1000, (batch, 9))
    found, states = {}, {}
    for name, model in (("small", small), ("rounded", rounded), ("exact", exact)):
        place = tokens.to(model.backbone.norm_f.weight.device)
        found[name], states[name] = model.prefill(place[:, :8])
        found[name] = torch.cat([found[name], model.step(place[:, 8], states[name])])
    truth = found["exact"]
    allowed = 2 * error(found["rounded"].cpu(), truth) + 1e-6
    assert error(found["small"].cpu(), truth) <= allowed


@torch.no_grad()
def test_a_step_in_a_graph() -> None:
    small, _ = make_models(8)
    small.to("cuda", torch.bfloat16)
    tokens = torch.tensor([5, 7], device="cuda")
    _, state = small.prefill(torch.randint(1000, (2, 6), device="cuda"))
    expected = small.step(tokens, state.clone())
    captured, graph = state.clone(), torch.cuda.CUDAGraph()
    small.step(tokens, state.clone())
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        logits = small.step(tokens, captured)
    graph.replay()
    assert torch.equal(logits, expected)
