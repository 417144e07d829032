"""Laws of the scan that hold for any input, for every backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambakit.ops import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step

BACKENDS = ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
sizes = st.tuples(
    st.integers(1, 3),  # batch
    st.integers(2, 40),  # seqlen
    st.integers(1, 20),  # d_inner
    st.integers(1, 4),  # d_state
)
seeds = st.integers(0, 2**31)
scan = partial(selective_scan, dt_softplus=True)
laws = settings(max_examples=25, deadline=None)


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "cuda" else "cpu")


def normals(backend: str, seed: int) -> Callable[..., Tensor]:
    """Draws a tensor of random numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(device_of(backend))


def inputs(backend: str, size: tuple[int, int, int, int], seed: int) -> dict[str, Tensor]:
    batch, seqlen, d_inner, d_state = size
    normal = normals(backend, seed)
    return {
        "x": normal(batch, seqlen, d_inner), "dt": normal(batch, seqlen, d_inner),
        "A": -normal(d_inner, d_state).exp(), "B": normal(batch, seqlen, d_state),
        "C": normal(batch, seqlen, d_state), "D": normal(d_inner),
        "z": normal(batch, seqlen, d_inner), "dt_bias": normal(d_inner) - 2,
    }  # fmt: skip


def at(tensors: dict[str, Tensor], times: slice | int) -> dict[str, Tensor]:
    """The same parameters, the activations at these times."""
    return {k: v[:, times] if v.ndim == 3 else v for k, v in tensors.items()}


def documents(backend: str, seqlen: int, seed: int) -> Tensor:
    """Document numbers of one row, in runs of random lengths."""
    starts = torch.rand(1, seqlen, generator=torch.Generator().manual_seed(seed)) < 0.25
    return starts.cumsum(1).to(device_of(backend))


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@laws
@given(size=sizes, seed=seeds, cut=st.floats(0, 1))
def test_a_scan_continues_from_its_state(backend: str, size, seed: int, cut: float) -> None:
    tensors, seqlen = inputs(backend, size, seed), size[1]
    middle = round(cut * seqlen)
    y, state = scan(**tensors, backend=backend)
    first, between = scan(**at(tensors, slice(middle)), backend=backend)
    second, last = scan(**at(tensors, slice(middle, None)), initial_state=between, backend=backend)
    close(torch.cat([first, second], dim=1), y)
    close(last, state)


@pytest.mark.parametrize("backend", BACKENDS)
@laws
@given(size=sizes, seed=seeds)
def test_steps_make_a_scan(backend: str, size, seed: int) -> None:
    tensors = inputs(backend, size, seed)
    batch, seqlen, d_inner, d_state = size
    y, final = scan(**tensors, backend=backend)
    state = torch.zeros(batch, d_inner, d_state, device=device_of(backend))
    steps = [
        selective_scan_step(state, **at(tensors, t), dt_softplus=True, backend=backend)
        for t in range(seqlen)
    ]
    close(torch.stack(steps, dim=1), y)
    close(state, final)


@pytest.mark.parametrize("backend", BACKENDS)
@laws
@given(size=sizes, seed=seeds)
def test_packed_documents_are_scanned_as_if_alone(backend: str, size, seed: int) -> None:
    tensors, seqlen = inputs(backend, (1, *size[1:]), seed), size[1]
    seq_idx = documents(backend, seqlen, seed)
    y, state = scan(**tensors, seq_idx=seq_idx, backend=backend)
    for document in seq_idx.unique():
        where = (seq_idx[0] == document).nonzero()[:, 0]
        alone = at(tensors, slice(int(where[0]), int(where[-1]) + 1))
        expected, last = scan(**alone, backend=backend)
        close(y[:, where], expected)
    close(state, last)


@pytest.mark.parametrize("backend", BACKENDS)
@laws
@given(size=sizes, seed=seeds, when=st.floats(0, 0.99))
def test_the_future_does_not_matter(backend: str, size, seed: int, when: float) -> None:
    tensors, t = inputs(backend, size, seed), int(when * size[1])
    other = {k: v.clone() for k, v in tensors.items()}
    for value in other.values():
        if value.ndim == 3:
            value[:, t:] += 1
    y, _ = scan(**tensors, backend=backend)
    changed, _ = scan(**other, backend=backend)
    assert torch.equal(y[:, :t], changed[:, :t])


@pytest.mark.parametrize("backend", BACKENDS)
@laws
@given(size=sizes, seed=seeds)
def test_rows_of_a_batch_do_not_matter_to_one_another(backend: str, size, seed: int) -> None:
    """To the bit with the kernels; PyTorch's own sums depend on the memory layout."""
    same = torch.allclose if backend == "reference" else torch.equal
    tensors = inputs(backend, size, seed)
    y, state = scan(**tensors, backend=backend)
    for row in range(size[0]):
        alone = {k: v[row : row + 1] if v.ndim == 3 else v for k, v in tensors.items()}
        expected, last = scan(**alone, backend=backend)
        assert same(y[row : row + 1], expected)
        assert same(state[row : row + 1], last)


@pytest.mark.parametrize("backend", BACKENDS)
@laws
@given(size=sizes, seed=seeds, factor=st.floats(-8, 8))
def test_linear_in_x(backend: str, size, seed: int, factor: float) -> None:
    tensors = inputs(backend, size, seed)
    y, state = scan(**tensors, backend=backend)
    scaled, scaled_state = scan(**{**tensors, "x": factor * tensors["x"]}, backend=backend)
    torch.testing.assert_close(scaled, factor * y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled_state, factor * state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_time_passes_when_dt_is_zero(backend: str) -> None:
    tensors = inputs(backend, (2, 7, 5, 3), 0)
    tensors["dt"].zero_()
    tensors["dt_bias"].zero_()
    start = torch.randn(2, 5, 3).to(device_of(backend))
    _, state = selective_scan(**tensors, initial_state=start, backend=backend)
    assert torch.equal(state, start)


@pytest.mark.parametrize("backend", BACKENDS)
@laws
@given(size=sizes, width=st.integers(1, 5), seed=seeds, cut=st.floats(0, 1))
def test_a_convolution_continues_from_its_state(
    backend: str, size, width: int, seed: int, cut: float
) -> None:
    batch, seqlen, channels, _ = size
    normal = normals(backend, seed)
    x, weight, bias = normal(batch, seqlen, channels), normal(channels, width), normal(channels)
    conv = partial(causal_conv1d, weight=weight, bias=bias, activation="silu", backend=backend)
    middle = round(cut * seqlen)
    y, state = conv(x)
    first, between = conv(x[:, :middle])
    second, last = conv(x[:, middle:], initial_state=between)
    close(torch.cat([first, second], dim=1), y)
    assert torch.equal(last, state)
    stepped = torch.zeros(batch, channels, width - 1, device=device_of(backend))
    steps = [
        causal_conv1d_step(stepped, x[:, t], weight, bias, "silu", backend=backend)
        for t in range(seqlen)
    ]
    close(torch.stack(steps, dim=1), y)
    assert torch.equal(stepped, state)


@pytest.mark.parametrize("backend", BACKENDS)
@laws
@given(size=sizes, width=st.integers(1, 5), seed=seeds)
def test_packed_documents_are_convolved_as_if_alone(
    backend: str, size, width: int, seed: int
) -> None:
    _, seqlen, channels, _ = size
    normal = normals(backend, seed)
    x, weight = normal(1, seqlen, channels), normal(channels, width)
    seq_idx = documents(backend, seqlen, seed)
    y, state = causal_conv1d(x, weight, seq_idx=seq_idx, backend=backend)
    for document in seq_idx.unique():
        where = (seq_idx[0] == document).nonzero()[:, 0]
        expected, last = causal_conv1d(x[:, where], weight, backend=backend)
        close(y[:, where], expected)
    assert torch.equal(state, last)
