from __future__ import annotations

import pytest
import torch

from mambakit.models import MambaConfig, MambaLanguageModel


@pytest.fixture
def reciting_model() -> MambaLanguageModel:
    """Of bytes: after each id, the next one is by far the likeliest."""
    model = MambaLanguageModel(
        MambaConfig(d_model=264, n_layer=1, vocab_size=257, tie_embeddings=False)
    ).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.copy_(torch.eye(264))
        model.lm_head.weight.copy_(20 * torch.eye(264).roll(1, 0))
        for block in model.backbone.blocks():
            block.mixer.out_proj.weight.zero_()
    return model
