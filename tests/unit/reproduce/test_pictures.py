from __future__ import annotations

import torch
from torch.nn.functional import softplus

from mambakit.models import MambaConfig, MambaLanguageModel
from mambakit.reproduce import Experiment
from mambakit.reproduce.models import build
from mambakit.reproduce.pictures import has_steps, time_steps


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
