from __future__ import annotations

import torch
from torch.nn.functional import softplus

from mambakit.models import MambaConfig, MambaLanguageModel
from mambakit.reproduce import Experiment
from mambakit.reproduce.models import build
from mambakit.reproduce.pictures import has_steps, most_selective, time_steps


def test_time_steps_are_those_of_the_scan():
    torch.manual_seed(0)
    model = MambaLanguageModel(MambaConfig(d_model=8, n_layer=2, vocab_size=8))
    tokens = torch.tensor([1, 5, 2])
    layers = time_steps(model, tokens)
    assert [tuple(dt.shape) for dt in layers] == [(3, 16), (3, 16)]
    block = next(model.backbone.blocks())
    with torch.no_grad():
        hidden = block.norm(model.backbone.embedding(tokens[None]))
        x, _ = block.mixer.conv1d(block.mixer.in_proj(hidden)[..., :16])
        low_rank = block.mixer.x_proj(x)[..., :1]
        dt = softplus(low_rank @ block.mixer.dt_proj.weight.T + block.mixer.dt_proj.bias)
    torch.testing.assert_close(layers[0], dt[0])
    assert not any(m._forward_hooks for m in model.modules())


def test_who_has_time_steps(tiny: Experiment):
    have = {name for name, c in tiny.contestants.items() if has_steps(build(c.model, 0))}
    assert have == {"mamba"}


def test_channels_are_sorted_by_what_they_let_in():
    kinds = {name: torch.tensor(mask) for name, mask in (
        ("noise", [True, False, True, False]),
        ("data", [False, True, False, False]),
        ("marker", [False, False, False, True]),
    )}  # fmt: skip
    dt = torch.tensor(
        [[1.0, 8.0, 0.1], [1.0, 2.0, 1.0], [4.0, 2.0, 0.1], [1.0, 2.0, 1.0]]
    )  # At what matters 1 / 2, 1 / 2 and 10 times as large; 8 and 2 have the mean 4.
    assert most_selective(dt, kinds).tolist()[0] == 2
    dt[1, 0] = 4
    assert most_selective(dt, kinds).tolist() == [2, 0, 1]
