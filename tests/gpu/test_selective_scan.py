"""The scan on a GPU at every kind of size. What all backends must do is in tests/parity."""

from functools import partial

import pytest
import torch
from accuracy import assert_accurate, run
from scan_inputs import DTYPES, case, documents

from mambakit.ops import selective_scan

pytestmark = pytest.mark.gpu
scan = partial(selective_scan, dt_softplus=True)
STATES = [1, 3, 4, 5, 8, 16, 17, 32, 33, 64, 100, 128, 256]


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("d_state", STATES)
def test_states(d_state: int, is_complex: bool) -> None:
    assert_accurate(scan, case(2, 37, 130, d_state, is_complex=is_complex), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d_state", [5, 16, 33, 64])
def test_states_in_half_precision(d_state: int, dtype: torch.dtype) -> None:
    assert_accurate(scan, case(2, 67, 130, d_state, dtype=dtype), "cuda")


@pytest.mark.parametrize("d_inner", [1, 17, 63, 65, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels(dtype: torch.dtype, d_inner: int) -> None:
    draws = [case(2, 35, d_inner, 16, dtype=dtype) for _ in range(max(1, 60 // d_inner))]
    assert_accurate(scan, draws, "cuda")


@pytest.mark.parametrize("seqlen", [1, 2, 31, 63, 64, 127, 129, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lengths(dtype: torch.dtype, seqlen: int) -> None:
    inputs = {**case(2, seqlen, 256, 16, dtype=dtype), "seq_idx": documents(2, seqlen)}
    assert_accurate(scan, inputs, "cuda")


@pytest.mark.slow
@pytest.mark.parametrize(("d_inner", "d_state"), [(64, 16), (130, 3)])
def test_long_sequences(d_inner: int, d_state: int) -> None:
    assert_accurate(scan, case(1, 4097, d_inner, d_state), "cuda")


@pytest.mark.parametrize("d_state", [5, 16])
@pytest.mark.parametrize(("groups", "width"), [(2, 64), (3, 65), (5, 26), (2, 17), (66, 2)])
def test_groups(groups: int, width: int, d_state: int) -> None:
    assert_accurate(scan, case(2, 41, groups * width, d_state, groups=groups), "cuda")


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_batches(batch: int) -> None:
    inputs = case(batch, 33, 130, 16)
    if batch:
        assert_accurate(scan, inputs, "cuda")
    found = run(scan, inputs, "cuda")
    assert found["output 0"].shape == (batch, 33, 130)
    if batch == 0:
        # What is not of the batch has a gradient of zeros, not of whatever was in memory.
        assert not any(found[f"gradient of {name}"].any() for name in ("A", "D", "dt_bias"))


CHUNKS = [1, 2, 3, 7]


@pytest.fixture(params=CHUNKS, ids=lambda chunks: f"{chunks} chunks")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Into how many chunks the scan cuts time, whatever the shape."""
    from mambakit.ops.cuda import selective_scan as cuda

    monkeypatch.setattr(cuda, "CHUNKS", request.param)
    return request.param


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("seqlen", [5, 300])
@pytest.mark.parametrize("kind", ["plain", "documents", "complex", "groups", "bfloat16", "N = 5"])
def test_any_number_of_chunks(kind: str, seqlen: int) -> None:
    inputs = case(
        2,
        seqlen,
        200,
        5 if kind == "N = 5" else 16,
        dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32,
        groups=5 if kind == "groups" else None,
        is_complex=kind == "complex",
    )
    if kind == "documents":
        inputs["seq_idx"] = documents(2, seqlen)
    assert_accurate(scan, inputs, "cuda")


@pytest.mark.parametrize("chunks", [1, 3], ids=lambda chunks: f"{chunks} chunks")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "complex", "documents"])
def test_gradients_are_the_same_bits_every_time(
    kind: str, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambakit.ops.cuda import selective_scan as cuda

    monkeypatch.setattr(cuda, "CHUNKS", chunks)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    inputs = case(3, 700, 330, 16, dtype=dtype, is_complex=kind == "complex")
    if kind == "documents":
        inputs["seq_idx"] = documents(3, 700)
    first = run(scan, inputs, "cuda")
    for _ in range(4):
        again = run(scan, inputs, "cuda")
        assert all(torch.equal(again[name], first[name]) for name in first)
