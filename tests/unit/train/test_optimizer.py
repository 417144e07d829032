from __future__ import annotations

from mambakit.models.config import MambaConfig
from mambakit.models.language_model import MambaLanguageModel
from mambakit.train.config import TrainConfig
from mambakit.train.optimizer import make_optimizer, parameter_groups

MODEL = MambaLanguageModel(MambaConfig(d_model=16, n_layer=1, vocab_size=8, bias=True))


def names(group: dict) -> set[str]:
    chosen = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in MODEL.named_parameters() if id(parameter) in chosen}


def test_matrices_are_decayed_and_the_rest_is_not() -> None:
    decayed, kept = parameter_groups(MODEL, 0.3)
    mixer = "backbone.layers.0.mixer"
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert names(decayed) == {
        "backbone.embedding.weight",
        *(
            f"{mixer}.{name}.weight"
            for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
        ),
    }
    assert names(kept) == {
        "backbone.norm_f.weight",
        "backbone.layers.0.norm.weight",
        f"{mixer}.A_log",
        f"{mixer}.D",
        *(f"{mixer}.{name}.bias" for name in ("in_proj", "conv1d", "dt_proj", "out_proj")),
    }


def test_frozen_parameters_are_left_out() -> None:
    MODEL.backbone.embedding.weight.requires_grad_(False)
    try:
        assert "backbone.embedding.weight" not in names(parameter_groups(MODEL, 0.1)[0])
    finally:
        MODEL.backbone.embedding.weight.requires_grad_(True)


def test_the_optimizer_takes_the_config() -> None:
    config = TrainConfig(data="a", out="b", betas=(0.8, 0.9), weight_decay=0.2, lr=0.01)
    optimizer = make_optimizer(MODEL, config)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
