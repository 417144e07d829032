"""The scan on a GPU at every kind of size. What all backends must do is in tests/parity."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from accuracy import assert_accurate, on_device_of, run
from scan_inputs import DTYPES, OPTIONAL, case, documents

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "documents", "groups", "constant"])
@pytest.mark.parametrize(("seqlen", "channels"), [(5, 200), (300, 65)])
def test_few_blocks(
    kind: str,
    dtype: torch.dtype,
    chunks: int,
    seqlen: int,
    channels: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels with the registers that few blocks leave, whatever the shape; the backward walks 8 steps at a time."""
    from mambakit.ops.cuda import selective_scan as cuda

    monkeypatch.setattr(cuda, "CHUNKS", chunks)
    monkeypatch.setattr(cuda, "IS_FEW", True)
    groups = 5 if kind == "groups" else None
    constant = "BC" if kind == "constant" else ""
    inputs = case(2, seqlen, channels, 13, dtype=dtype, groups=groups, constant=constant)
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


HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few channels are walked in one pass, whatever the shape."""
    from mambakit.ops.cuda import selective_scan as cuda

    launches = []
    launch = cuda._Inputs.run_narrow

    def run_narrow(inputs: cuda._Inputs, *arguments: object) -> None:
        launches.append(inputs)
        launch(inputs, *arguments)

    monkeypatch.setattr(cuda, "IS_NARROW", True)
    monkeypatch.setattr(cuda._Inputs, "run_narrow", run_narrow)
    yield
    assert launches


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("seqlen", [5, 300])
@pytest.mark.parametrize("kind", ["plain", "documents", "groups", "B", "C", "BC", "absent"])
def test_narrow_with_every_option(kind: str, seqlen: int, dtype: torch.dtype) -> None:
    inputs = case(
        2,
        seqlen,
        200,
        16,
        dtype=dtype,
        groups=5 if kind == "groups" else None,
        constant=kind if kind in ("B", "C", "BC") else "",
        absent=OPTIONAL if kind == "absent" else (),
    )
    if kind == "documents":
        inputs["seq_idx"] = documents(2, seqlen)
    if kind == "absent":
        inputs["dt"] = inputs["dt"].abs()
    assert_accurate(partial(selective_scan, dt_softplus=kind != "absent"), inputs, "cuda")


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("d_state", [9, 10, 12, 15])
def test_narrow_states(d_state: int, dtype: torch.dtype) -> None:
    assert_accurate(scan, case(2, 67, 130, d_state, dtype=dtype), "cuda")


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("d_inner", [1, 4, 15, 17, 66])
def test_narrow_channels(d_inner: int, dtype: torch.dtype) -> None:
    draws = [case(2, 35, d_inner, 16, dtype=dtype) for _ in range(max(1, 60 // d_inner))]
    assert_accurate(scan, draws, "cuda")


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 63, 64, 65, 128, 129, 513])
def test_narrow_lengths(seqlen: int) -> None:
    inputs = {**case(2, seqlen, 128, 16, dtype=torch.bfloat16), "seq_idx": documents(2, seqlen)}
    assert_accurate(scan, inputs, "cuda")


@pytest.mark.usefixtures("narrow")
def test_narrow_views() -> None:
    """Tensors out of one projection, and a transposed one, at any alignment, give what copies give."""
    inputs = on_device_of("cuda", case(2, 133, 48, 16, dtype=torch.bfloat16))
    for gap in (0, 1, 2, 4, 8):
        parts = [inputs[name] for name in ("x", "z", "B", "C")]
        whole = torch.cat([parts[0].new_zeros(2, 133, gap), *parts], dim=-1)
        _, x, z, B, C = whole.split([gap, 48, 48, 16, 16], dim=-1)
        views = {**inputs, "x": x, "z": z, "B": B, "C": C}
        views["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
        assert all(
            torch.equal(ours, expected)
            for ours, expected in zip(
                scan(**views, backend="cuda"), scan(**inputs, backend="cuda"), strict=True
            )
        )


@pytest.mark.usefixtures("narrow")
def test_narrow_is_the_same_bits_every_time() -> None:
    inputs = {**case(3, 700, 330, 16, dtype=torch.bfloat16), "seq_idx": documents(3, 700)}
    first = run(scan, inputs, "cuda")
    with torch.no_grad():
        y, state = scan(**on_device_of("cuda", inputs), backend="cuda")
    assert torch.equal(y.cpu(), first["output 0"])
    assert torch.equal(state.cpu(), first["output 1"])
    for _ in range(4):
        again = run(scan, inputs, "cuda")
        assert all(torch.equal(again[name], first[name]) for name in first)
