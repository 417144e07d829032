from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mambakit.generate.decoding import Chosen, Decoder
from mambakit.generate.sampling import Method
from mambakit.models import MambaConfig, MambaLanguageModel


@pytest.fixture(scope="session")
def small() -> MambaLanguageModel:
    """50 ids in an embedding of 64 rows."""
    torch.manual_seed(0)
    config = MambaConfig(
        d_model=16, n_layer=2, vocab_size=50, pad_vocab_size_multiple=64, tie_embeddings=False
    )
    return MambaLanguageModel(config)


@pytest.fixture
def before_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], object]], None]:
    """Let a function see the size of the batch before every step of any decoder."""
    step = Decoder.step

    def install(function: Callable[[int], object]) -> None:
        def observed(self: Decoder, method: Method) -> Chosen:
            function(self.slots.taken)
            return step(self, method)

        monkeypatch.setattr(Decoder, "step", observed)

    return install
