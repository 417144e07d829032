from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from mambakit.data.dataset import TokenDataset
from mambakit.data.loader import Loader, windows
from mambakit.data.preparation import prepare
from mambakit.errors import ArgumentError, CheckpointError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loader")
    lines = [json.dumps({"text": chr(97 + i % 26) * (5 + i % 7)}) for i in range(200)]
    (path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare(path / "a.jsonl", path / "out", valid_fraction=0.1)
    return path / "out"


@pytest.fixture(scope="module")
def dataset(folder: Path) -> TokenDataset:
    return TokenDataset(folder)


def test_a_batch_is_windows_of_the_stream_shifted_by_one(dataset: TokenDataset) -> None:
    batch = next(Loader(dataset, seqlen=16, batch_size=4, seed=3))
    assert batch.tokens.shape == batch.targets.shape == (4, 16)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens.is_contiguous()
    assert batch.targets.is_contiguous()
    assert batch.seq_idx is None
    stream = dataset.tokens.tolist()
    found = [stream[i : i + 17] for i in range(len(stream))]
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        assert [*tokens, targets[-1]] in found
        assert tokens[1:] == targets[:-1]


def test_document_numbers_change_at_separators(dataset: TokenDataset) -> None:
    for batch in islice(Loader(dataset, seqlen=16, batch_size=4, documents=True), 5):
        assert batch.seq_idx is not None
        assert batch.seq_idx.dtype == torch.int32
        opens = batch.tokens == 256
        opens[:, 0] = False
        assert torch.equal(batch.seq_idx, opens.cumsum(1).int())


def test_seeds_and_epochs_have_orders_of_their_own(dataset: TokenDataset) -> None:
    def first(seed: int) -> list[list[int]]:
        return next(Loader(dataset, seqlen=8, batch_size=8, seed=seed)).tokens.tolist()

    assert first(1) == first(1)
    assert first(1) != first(2)
    loader = Loader(dataset, seqlen=8, batch_size=1)
    epochs = [[next(loader).tokens for _ in range(loader.windows_per_epoch)] for _ in range(2)]
    assert loader.epoch == 2.0
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


def test_the_state_is_small_json_and_refuses_another_run(
    dataset: TokenDataset, folder: Path
) -> None:
    loader = Loader(dataset, seqlen=8, batch_size=2)
    next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["position"] == 1
    expected = next(loader).tokens
    again = Loader(dataset, seqlen=8, batch_size=2)
    again.load_state_dict(state)
    assert torch.equal(next(again).tokens, expected)

    others = {
        "dataset": Loader(TokenDataset(folder, "valid"), seqlen=8, batch_size=2),
        "seqlen": Loader(dataset, seqlen=9, batch_size=2),
        "batch_size": Loader(dataset, seqlen=8, batch_size=3),
        "world_size": Loader(dataset, seqlen=8, batch_size=2, world_size=2),
        "seed": Loader(dataset, seqlen=8, batch_size=2, seed=1),
        "documents": Loader(dataset, seqlen=8, batch_size=2, documents=True),
    }
    for name, other in others.items():
        with pytest.raises(CheckpointError, match=f"was saved with {name} = "):
            other.load_state_dict(state)


def test_a_batch_may_be_larger_than_an_epoch(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh", encoding="utf-8")
    prepare(tmp_path / "a.txt", tmp_path / "out", valid_fraction=0)
    batch = next(Loader(TokenDataset(tmp_path / "out"), seqlen=8, batch_size=5))
    assert batch.tokens.tolist() == [list(b"abcdefgh")] * 5


def test_a_split_shorter_than_a_window_is_an_error(dataset: TokenDataset) -> None:
    Loader(dataset, seqlen=len(dataset) - 1, batch_size=1)
    with pytest.raises(DataError, match=r"fewer than one window of .* choose a shorter seqlen"):
        Loader(dataset, seqlen=len(dataset), batch_size=1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"seqlen": 0}, "seqlen: got 0"),
        ({"batch_size": -1}, "batch_size: got -1"),
        ({"world_size": 0}, "world_size: got 0"),
        ({"rank": 2, "world_size": 2}, "rank: got 2, wanted 0 to 1"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_options_out_of_range(dataset: TokenDataset, option: dict[str, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Loader(dataset, **{"seqlen": 8, "batch_size": 1, **option})


def test_evaluation_windows_go_once_through_the_split(dataset: TokenDataset) -> None:
    stream = dataset.tokens.tolist()
    batches = list(windows(dataset, seqlen=30, batch_size=4, documents=True))
    assert [t for batch in batches for t in batch.targets.flatten().tolist()] == stream[1:]
    assert [t for batch in batches for t in batch.tokens.flatten().tolist()] == stream[:-1]
    assert batches[0].tokens.shape == (4, 30)
    assert batches[0].seq_idx is not None
    with pytest.raises(ArgumentError, match="batch_size: got 0"):
        next(windows(dataset, seqlen=30, batch_size=0))


def test_a_batch_can_be_moved(dataset: TokenDataset) -> None:
    batch = next(Loader(dataset, seqlen=8, batch_size=1, documents=True)).to("meta")
    assert batch.seq_idx is not None
    assert {t.device.type for t in (batch.tokens, batch.targets, batch.seq_idx)} == {"meta"}


def test_a_batch_takes_less_than_a_few_milliseconds(dataset: TokenDataset) -> None:
    loader = Loader(dataset, seqlen=256, batch_size=32)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        next(loader)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3
