from __future__ import annotations

import math

import pytest
import torch

from mambakit.reproduce.attention import AttentionConfig, AttentionModel, _rotate, _rotations

POSITIONS = ["absolute", "rope", "xpos"]


@pytest.mark.parametrize("positions", POSITIONS)
def test_it_has_the_papers_number_of_parameters(positions):
    model = AttentionModel(AttentionConfig(positions=positions))
    assert round(model.num_parameters(), -3) == 137_000


@pytest.mark.parametrize("positions", POSITIONS)
def test_it_sees_the_past_alone_and_its_order(positions):
    torch.manual_seed(0)
    model = AttentionModel(AttentionConfig(d_model=16, n_head=2, positions=positions))
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    hidden = model.hidden(tokens)
    assert hidden.shape == (1, 5, 16)
    changed = model.hidden(torch.tensor([[1, 2, 3, 4, 6]]))
    torch.testing.assert_close(changed[:, :4], hidden[:, :4])
    swapped = model.hidden(torch.tensor([[2, 1, 3, 4, 5]]))
    assert (swapped[:, 4] - hidden[:, 4]).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["rope", "xpos"])
def test_scores_are_those_of_the_definition(positions):
    """q_n . k_m is Re sum of q k* exp(i (n - m) theta), times zeta^((n - m) / 512) with xPos."""
    config = AttentionConfig(positions=positions)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 700, 16)
    of_q, of_k = _rotations(700, config, torch.device("cpu"))
    n, m = 690, 11
    pair = torch.arange(8)
    theta = 10000.0 ** (-2 * pair / 16)
    zeta = (2 * pair / 16 + 0.4) / 1.4 if positions == "xpos" else torch.ones(8)
    wanted = zeta ** ((n - m) / 512) * torch.cos((n - m) * theta)
    got = (of_q[n] * of_k[m].conj()).real
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    score = _rotate(q, of_q)[0, 0, n] @ _rotate(k, of_k)[0, 0, m]
    products = (
        torch.complex(*q[0, 0, n].view(8, 2).T) * torch.complex(*k[0, 0, m].view(8, 2).T).conj()
    )
    turned = products * torch.polar(zeta ** ((n - m) / 512), (n - m) * theta)
    torch.testing.assert_close(score, turned.real.sum(), rtol=1e-3, atol=1e-4)


def test_absolute_positions_are_sines():
    config = AttentionConfig(d_model=4, n_layer=1, n_head=1, positions="absolute")
    model = AttentionModel(config)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.hidden(torch.tensor([[7, 7, 7]]))
    added = seen[0][0, 2] - model.embedding.weight[7]
    wanted = [math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)]
    torch.testing.assert_close(added, torch.tensor(wanted), rtol=1e-4, atol=1e-5)
