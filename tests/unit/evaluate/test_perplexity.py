from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mambakit.data import BytesTokenizer, TokenDataset, prepare, windows
from mambakit.errors import DataError
from mambakit.evaluate import Score, count_bytes, score
from mambakit.models.config import MambaConfig
from mambakit.models.language_model import MambaLanguageModel

TOKENIZER = BytesTokenizer()


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    for name, text in (("a.txt", "one café\n" * 5), ("b.txt", "two\n" * 9)):
        (tmp_path / name).write_bytes(text.encode())
    prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "tokens", valid_fraction=0)
    return TokenDataset(tmp_path / "tokens")


def make_model() -> MambaLanguageModel:
    torch.manual_seed(0)
    return MambaLanguageModel(MambaConfig(d_model=8, n_layer=1, vocab_size=257))


def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary(dataset: TokenDataset) -> None:
    model = make_model()
    torch.nn.init.zeros_(model.backbone.embedding.weight)
    result = score(model, windows(dataset, 16, 2), count_bytes(TOKENIZER))
    text_bytes = 5 * 10 + 9 * 4
    assert result.tokens == text_bytes + 1  # Two separators more, the first byte less.
    assert result.bytes == text_bytes - 1  # The first byte is never predicted.
    assert result.loss == pytest.approx(math.log(264))  # The padded vocabulary.
    assert result.perplexity == pytest.approx(264)
    assert result.bits_per_byte == pytest.approx(math.log2(264) * result.tokens / result.bytes)


def test_batches_of_other_sizes_give_the_same_score(dataset: TokenDataset) -> None:
    model = make_model()
    results = [score(model, windows(dataset, 16, b), count_bytes(TOKENIZER)) for b in (1, 4)]
    assert results[0].nats == pytest.approx(results[1].nats, rel=1e-6)
    assert results[0].tokens == results[1].tokens


def test_documents_start_from_an_empty_state(dataset: TokenDataset) -> None:
    model = make_model()
    apart, joined = (
        score(model, windows(dataset, 64, 1, documents=documents), count_bytes(TOKENIZER)).nats
        for documents in (True, False)
    )
    assert apart != joined


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_kept(dataset: TokenDataset, training: bool) -> None:
    model = make_model().train(training)
    score(model, windows(dataset, 16, 2), count_bytes(TOKENIZER))
    assert model.training is training


def test_nothing_to_score() -> None:
    with pytest.raises(DataError, match="empty"):
        score(make_model(), [], count_bytes(TOKENIZER))


def test_a_hopeless_model_has_a_finite_perplexity() -> None:
    assert math.isfinite(Score(nats=1e6, tokens=10, bytes=10).perplexity)


def test_bytes_of_each_id() -> None:
    assert count_bytes(TOKENIZER).tolist() == [1] * 256 + [0]
