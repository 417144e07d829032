"""AdamW and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mambakit.train.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Make AdamW with the paper's groups; the learning rate is set anew before every step.

    On a GPU its state and the learning rate are tensors there, as a CUDA graph needs them.

    Source: Gu & Dao 2023 (arXiv 2312.00752) appendix E.2.1: betas (0.9, 0.95), weight decay 0.1.
    """
    groups = parameter_groups(model, config.weight_decay)
    device = groups[0]["params"][0].device
    on_gpu = device.type == "cuda"
    for group in groups:
        group["lr"] = torch.tensor(config.lr, device=device) if on_gpu else config.lr
    return torch.optim.AdamW(groups, betas=config.betas, fused=True, capturable=on_gpu)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into a decayed and an undecayed group, in the model's order.

    Not decayed: what the model marks with `_no_weight_decay` (A_log, D, dt_bias) and every vector
    (biases, norm weights). Decayed: matrices, the conv filters and the embedding, which is the
    output head too when they are tied.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and not getattr(p, "_no_weight_decay", False)]
    kept = {id(parameter) for parameter in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in kept], "weight_decay": 0.0},
    ]
