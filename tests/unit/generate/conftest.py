from __future__ import annotations

import pytest
import torch

from mambakit.models import MambaConfig, MambaLanguageModel


@pytest.fixture(scope="session")
def small() -> MambaLanguageModel:
    """50 ids in an embedding of 64 rows."""
    torch.manual_seed(0)
    config = MambaConfig(
        d_model=16, n_layer=2, vocab_size=50, pad_vocab_size_multiple=64, tie_embeddings=False
    )
    return MambaLanguageModel(config)
