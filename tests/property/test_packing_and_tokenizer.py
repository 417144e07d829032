from __future__ import annotations

import json
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambakit.data.dataset import TokenDataset
from mambakit.data.loader import Loader, windows
from mambakit.data.packing import document_numbers
from mambakit.data.permutation import permuted
from mambakit.data.preparation import prepare
from mambakit.data.tokenizer import BytesTokenizer, JsonTokenizer, Tokenizer

brief = settings(deadline=None, max_examples=60, derandomize=True)


@lru_cache
def _tokenizer(kind: str) -> Tokenizer:
    if kind == "bytes":
        return BytesTokenizer()
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["the cat sat on the mat " * 9], trainer)
    return JsonTokenizer(raw.to_str())


kinds = st.sampled_from(["bytes", "bpe"])
texts = st.text(st.characters(exclude_categories=("Cs",))) | st.text("the cat", max_size=40)


@brief
@given(kinds, texts)
def test_text_survives_a_round_trip(kind: str, text: str) -> None:
    tokenizer = _tokenizer(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


@brief
@given(kinds, st.lists(st.integers(0, 256)), st.lists(st.integers(0, 256)))
def test_decoding_goes_token_by_token(kind: str, a: list[int], b: list[int]) -> None:
    tokenizer = _tokenizer(kind)
    assert tokenizer.decode_bytes(a + b) == tokenizer.decode_bytes(a) + tokenizer.decode_bytes(b)


@brief
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_document_numbers_count_the_separators(lengths: list[int], data: st.DataObject) -> None:
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    start = data.draw(st.integers(0, total - 1))
    seqlen = data.draw(st.integers(1, total - start))
    is_separator = np.isin(np.arange(total), ends - 1)
    expected = np.cumsum(is_separator[start : start + seqlen]) - is_separator[start]
    assert document_numbers(ends, start, seqlen).tolist() == expected.tolist()


@brief
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 10**9))
def test_an_order_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = permuted(np.arange(size), size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))


def test_orders_are_near_uniform() -> None:
    """How often each number stands at each place, over many orders, is a flat table."""
    size, orders = 5, 4000
    counts = np.zeros((size, size))
    for epoch in range(orders):
        counts[np.arange(size), permuted(np.arange(size), size, 0, epoch)] += 1
    deviation = (counts - orders / size) / np.sqrt(orders / size)
    assert np.abs(deviation).max() < 4.5


def test_huge_orders_need_no_memory() -> None:
    places = np.array([0, 1, 10**13 - 1])
    order = permuted(places, 10**13, 0, 0)
    assert len(set(order.tolist())) == 3
    assert (order >= 0).all()
    assert (order < 10**13).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": chr(97 + i % 26) * (i % 11)}) for i in range(120)]
    (path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare(path / "a.jsonl", path / "out", valid_fraction=0.3)
    return path / "out"


sizes = {"seqlen": st.integers(1, 40), "batch_size": st.integers(1, 7)}


@brief
@given(seed=st.integers(0, 2**32), world_size=st.integers(1, 4), **sizes)
def test_ranks_are_disjoint_and_together_complete(
    folder: Path, seqlen: int, batch_size: int, seed: int, world_size: int
) -> None:
    dataset = TokenDataset(folder)
    loaders = [
        Loader(dataset, seqlen, batch_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    per_epoch = loaders[0].windows_per_epoch
    steps = -(-per_epoch // (batch_size * world_size))
    starts = [loader._starts(step) for step in range(steps) for loader in loaders]
    epoch = np.sort(np.concatenate(starts)[:per_epoch])
    assert (np.diff(epoch) == seqlen).all()
    assert 0 <= epoch[0] <= epoch[-1] + seqlen < len(dataset)
    assert len(dataset) - per_epoch * seqlen <= 2 * seqlen + 1 or per_epoch == 1


@brief
@given(seed=st.integers(0, 99), done=st.integers(0, 50), **sizes)
def test_resumed_equals_uninterrupted(
    folder: Path, seqlen: int, batch_size: int, seed: int, done: int
) -> None:
    whole = Loader(TokenDataset(folder), seqlen, batch_size, seed=seed)
    for _ in islice(whole, done):
        pass
    resumed = Loader(TokenDataset(folder), seqlen, batch_size, seed=seed)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(3):
        ours, theirs = next(resumed), next(whole)
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.targets, theirs.targets)


@brief
@given(**sizes)
def test_evaluation_covers_every_token_once(folder: Path, seqlen: int, batch_size: int) -> None:
    dataset = TokenDataset(folder, "valid")
    batches = list(windows(dataset, seqlen, batch_size))
    targets = [token for batch in batches for token in batch.targets.flatten().tolist()]
    assert targets == dataset.tokens[1:].tolist()
    assert max(len(batch.tokens) for batch in batches) <= batch_size
