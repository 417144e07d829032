"""The Transformer for comparisons on a GPU: as accurate as on the CPU, compiled, and decoding in a graph."""

from __future__ import annotations

import pytest
import torch
from examples import captured
from torch import Tensor

from mambakit.models import TransformerConfig, TransformerLanguageModel

pytestmark = pytest.mark.gpu


def make_model(device: str = "cuda") -> TransformerLanguageModel:
    torch.manual_seed(0)
    config = TransformerConfig(d_model=128, n_layer=3, n_head=2, vocab_size=200)
    return TransformerLanguageModel(config).to(device)


def make_tokens(batch: int = 3, seqlen: int = 67) -> Tensor:
    return torch.randint(0, 200, (batch, seqlen), generator=torch.Generator().manual_seed(1)).cuda()


def test_training_step_in_bfloat16() -> None:
    """FlashAttention and our norms and loss, against float64 on the CPU."""

    def gradient(model: TransformerLanguageModel, tokens: Tensor) -> Tensor:
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([g.flatten().double().cpu() for g in gradients])

    tokens = make_tokens()
    exact = gradient(make_model("cpu").double(), tokens.cpu())
    errors = {}
    for device in ("cpu", "cuda"):
        with torch.autocast(device, torch.bfloat16):
            found = gradient(make_model(device), tokens.to(device))
        errors[device] = (found - exact).norm() / exact.norm()
    assert errors["cuda"] <= 2 * errors["cpu"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # The compiler's own.
def test_compiles_without_a_break() -> None:
    model, tokens = make_model(), make_tokens()

    def loss(tokens: Tensor) -> Tensor:
        return model.loss(tokens[:, :-1], tokens[:, 1:])[0]

    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss(tokens), parameters)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(tokens), parameters)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_of_a_decoding_step(dtype: torch.dtype) -> None:
    model, tokens = make_model().to(dtype), make_tokens()
    _, start = model.prefill(tokens[:, :30], max_length=67)
    eager, expected = start.clone(), []
    for t in range(30, 67):
        expected.append(model.step(tokens[:, t], eager))

    state, static = start.clone(), tokens[:, 30].clone()
    graph, (logits,) = captured(lambda: [model.step(static, state)])
    state.position.copy_(start.position)  # What the warm-up wrote behind it is written again.
    for t, truth in zip(range(30, 67), expected, strict=True):
        static.copy_(tokens[:, t])
        graph.replay()
        torch.testing.assert_close(logits, truth)
