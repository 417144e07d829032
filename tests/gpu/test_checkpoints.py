"""Checkpoints that go straight to a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mambakit.models import MambaConfig, MambaLanguageModel, load_model, save_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("format", ["mambakit", "official", "huggingface"])
def test_weights_on_the_gpu(tmp_path: Path, format: str, dtype: torch.dtype | None) -> None:
    model = MambaLanguageModel(MambaConfig(d_model=64, n_layer=2, vocab_size=256))
    save_model(model, tmp_path, format)
    loaded = load_model(tmp_path, "cuda", dtype)
    assert loaded.lm_head.weight is loaded.backbone.embedding.weight
    expected = model.to("cuda", dtype)
    for name, tensor in expected.state_dict().items():
        found = loaded.state_dict()[name]
        assert (found.device, found.dtype) == (tensor.device, tensor.dtype), name
        assert torch.equal(found, tensor), name
    tokens = torch.randint(0, 256, (2, 33), device="cuda")
    torch.testing.assert_close(loaded(tokens)[0], expected(tokens)[0])
