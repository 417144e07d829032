from functools import partial

import pytest
import torch
from accuracy import Tensors, assert_accurate, device_of, on_device_of, run, widen
from torch import Tensor

from mambakit.ops import causal_conv1d, causal_conv1d_step

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(
    batch: int = 2,
    seqlen: int = 35,
    channels: int = 70,
    width: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    absent: tuple[str, ...] = (),
) -> Tensors:
    tensors = {
        "x": torch.randn(batch, seqlen, channels).to(dtype),
        "weight": torch.randn(channels, width),
        "bias": torch.randn(channels),
        "initial_state": torch.randn(batch, channels, width - 1).to(dtype),
    }
    return {k: None if k in absent else v for k, v in tensors.items()}


def documents(batch: int, seqlen: int) -> Tensor:
    return (torch.rand(batch, seqlen) < 0.2).cumsum(1) % 3


silu = partial(causal_conv1d, activation="silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_present(backend: str, dtype: torch.dtype) -> None:
    assert_accurate(silu, {**case(dtype=dtype), "seq_idx": documents(2, 35)}, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_absent(backend: str, dtype: torch.dtype) -> None:
    assert_accurate(causal_conv1d, case(dtype=dtype, absent=("bias", "initial_state")), backend)


@pytest.mark.parametrize("absent", ["bias", "initial_state"])
def test_one_tensor_absent(backend: str, absent: str) -> None:
    assert_accurate(silu, {**case(absent=(absent,)), "seq_idx": documents(2, 35)}, backend)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seqlen", [1, 2, 3, 33, 64])
def test_widths_and_lengths(backend: str, width: int, seqlen: int) -> None:
    assert_accurate(silu, case(2, seqlen, width=width), backend)
    inputs = {**case(2, seqlen, width=width), "seq_idx": documents(2, seqlen)}
    assert_accurate(silu, inputs, backend)


@pytest.mark.parametrize("channels", [1, 17, 130, 600])
def test_channels(backend: str, channels: int) -> None:
    draws = [case(1, 40, channels) for _ in range(max(1, 100 // channels))]
    assert_accurate(silu, draws, backend)


def test_long_sums_of_the_weight_gradient(backend: str) -> None:
    assert_accurate(silu, case(1, 4097, 70), backend)


@pytest.mark.parametrize(("batch", "seqlen", "channels"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_to_convolve(backend: str, batch: int, seqlen: int, channels: int) -> None:
    inputs = case(batch, seqlen, channels)
    ours, reference = run(silu, inputs, backend), run(silu, inputs, "reference")
    for name, expected in reference.items():
        torch.testing.assert_close(ours[name], expected)


def test_equals_torch(backend: str) -> None:
    inputs = case(absent=("initial_state",))
    y, state = causal_conv1d(**on_device_of(backend, inputs), backend=backend)
    expected = torch.nn.functional.conv1d(
        inputs["x"].transpose(1, 2), inputs["weight"][:, None], inputs["bias"], padding=3, groups=70
    )
    torch.testing.assert_close(y.cpu(), expected[..., :35].transpose(1, 2))
    assert torch.equal(state.cpu(), inputs["x"][:, -3:].transpose(1, 2))


def test_strided_view(backend: str) -> None:
    with device_of(backend):
        wide, weight = torch.randn(2, 9, 50), torch.randn(20, 4)
    y, _ = causal_conv1d(wide[..., 25:45], weight, backend=backend)
    expected, _ = causal_conv1d(wide[..., 25:45].contiguous(), weight, backend=backend)
    assert torch.equal(y, expected)


def test_reference_gradients_twice() -> None:
    inputs = {k: widen(v).requires_grad_() for k, v in case(1, 5, 2, 3).items()}
    names = list(inputs)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, values, strict=True))
        return silu(**named, seq_idx=torch.tensor([[0, 0, 1, 1, 1]]), backend="reference")

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(
    backend: str, dtype: torch.dtype, width: int, bias: bool, activation: str | None
) -> None:
    inputs = case(3, 1, 70, width, dtype=dtype, absent=() if bias else ("bias",))
    state = inputs.pop("initial_state")
    inputs["x"] = inputs["x"][:, 0]
    expected_state = state.clone()
    expected = causal_conv1d_step(
        expected_state, **inputs, activation=activation, backend="reference"
    )
    state, inputs = state.to(device_of(backend)), on_device_of(backend, inputs)
    y = causal_conv1d_step(state, **inputs, activation=activation, backend=backend)
    y, state = y.cpu(), state.cpu()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=2 * eps, atol=4 * torch.finfo(torch.float32).eps)
    assert torch.equal(state, expected_state)
