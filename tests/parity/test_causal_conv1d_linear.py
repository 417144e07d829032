"""The convolution and the product behind it, in one kernel and in two."""

from functools import partial

import pytest
import torch
from accuracy import Tensors, assert_accurate, on_device_of
from torch import Tensor

from mambakit.models import MambaConfig, MambaLanguageModel
from mambakit.ops import causal_conv1d, cuda
from mambakit.ops.causal_conv1d_linear import causal_conv1d_linear, fuses
from mambakit.ops.cuda.arrays import has_warpgroups

silu = partial(causal_conv1d_linear, activation="silu")


def case(
    batch: int = 2,
    seqlen: int = 35,
    channels: int = 128,
    columns: int = 24,
    width: int = 4,
    *,
    dtype: torch.dtype = torch.bfloat16,
    parameters: torch.dtype = torch.float32,
    absent: tuple[str, ...] = (),
) -> Tensors:
    tensors = {
        "x": torch.randn(batch, seqlen, channels).to(dtype),
        "weight": torch.randn(channels, width).to(parameters),
        "matrix": (torch.randn(columns, channels) / channels**0.5).to(dtype),
        "bias": torch.randn(channels).to(parameters),
        "initial_state": torch.randn(batch, channels, width - 1).to(dtype),
    }
    return {k: None if k in absent else v for k, v in tensors.items()}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel does it, however few rows there are."""
    if not torch.cuda.is_available() or not has_warpgroups(torch.device("cuda")):
        pytest.skip("one kernel does both on Hopper alone")
    monkeypatch.setattr(cuda.causal_conv1d_linear, "ROWS_MEANWHILE", 0)


@torch.no_grad()
def compare(inputs: Tensors, activation: str | None = "silu") -> None:
    """It convolves as the convolution's own kernel does, bit for bit, and multiplies what comes out of that."""
    moved = on_device_of("cuda", inputs)
    assert fuses(moved["x"], moved["weight"], moved["matrix"])
    y, state, product = causal_conv1d_linear(**moved, activation=activation)
    matrix = moved.pop("matrix")
    expected_y, expected_state = causal_conv1d(**moved, activation=activation)
    assert torch.equal(y, expected_y)
    assert torch.equal(state, expected_state)
    exact = y.double() @ matrix.double().t()
    # A sum of 5,120 products in float32 that happens to be near zero is off by some 1e-5.
    torch.testing.assert_close(product.double(), exact, rtol=torch.finfo(y.dtype).eps, atol=5e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_kernel(dtype: torch.dtype, parameters: torch.dtype, at_once: None) -> None:
    compare(case(dtype=dtype, parameters=parameters))


@pytest.mark.gpu
@pytest.mark.parametrize("absent", [("bias",), ("initial_state",), ("bias", "initial_state")])
def test_one_kernel_without(absent: tuple[str, ...], at_once: None) -> None:
    compare(case(absent=absent), None)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("seqlen", [1, 2, 3, 8, 63, 64, 65, 127, 128, 129, 300])
def test_one_kernel_of_widths_and_lengths(width: int, seqlen: int, at_once: None) -> None:
    compare(case(3, seqlen, width=width))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 192, 640, 5120])
@pytest.mark.parametrize("columns", [2, 6, 80, 160, 192, 200])
def test_one_kernel_of_channels_and_columns(channels: int, columns: int, at_once: None) -> None:
    compare(case(2, 140, channels, columns))


@pytest.mark.gpu
@torch.no_grad()
def test_one_kernel_of_a_view_and_of_what_begins_anywhere(at_once: None) -> None:
    inputs = on_device_of("cuda", case(3, 100, 128, absent=("initial_state",)))
    expected = silu(**inputs)
    wide = torch.zeros(3, 100, 256 + 16, dtype=torch.bfloat16, device="cuda")
    wide[..., 8:136] = inputs["x"]
    shifted = {name: shift(inputs[name]) for name in ("weight", "bias", "matrix")}
    found = silu(x=wide[..., 8:136], **shifted)
    for ours, truth in zip(found, expected, strict=True):
        assert torch.equal(ours, truth)


def shift(tensor: Tensor) -> Tensor:
    """A copy that does not begin at 16 bytes."""
    flat = tensor.new_zeros(tensor.numel() + 1)[1:]
    return flat.view_as(tensor).copy_(tensor)


@pytest.mark.gpu
@torch.no_grad()
def test_two_kernels_where_one_cannot(at_once: None) -> None:
    fits = on_device_of("cuda", case())
    x, weight, matrix = fits["x"], fits["weight"], fits["matrix"]
    assert fuses(x, weight, matrix)
    assert not fuses(x.float(), weight, matrix.float())
    assert not fuses(x.half(), weight, matrix)
    assert not fuses(x[..., :96], weight, matrix)
    assert not fuses(x[..., 4:68], weight, matrix)
    assert not fuses(x, weight, matrix[1:])
    assert not fuses(x, weight, matrix.repeat(10, 1))
    assert not fuses(x, weight.repeat(1, 2), matrix)
    with torch.enable_grad():
        assert not fuses(x, weight, matrix)
    documents = torch.zeros(2, 35, dtype=torch.int64, device="cuda")
    assert not fuses(x, weight, matrix, documents)
    documents[:, 20:] = 1
    y, _, _ = silu(**fits, seq_idx=documents)
    whole, _, _ = silu(**fits)
    assert torch.equal(y[:, :20], whole[:, :20])
    assert not torch.equal(y[:, 20], whole[:, 20])


@pytest.mark.gpu
@torch.no_grad()
def test_a_model_reads_a_prompt_with_one_kernel(
    at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = MambaLanguageModel(MambaConfig(d_model=128, n_layer=3, vocab_size=100))
    model, tokens = model.to("cuda", torch.bfloat16), torch.randint(100, (2, 150), device="cuda")

    def results() -> list[Tensor]:
        logits, state = model.prefill(tokens)
        again, state = model.prefill(tokens, state)
        return [logits, again, *(layer.ssm_state for layer in state.layers)]

    called = []
    run = cuda.causal_conv1d_linear.causal_conv1d_linear
    counted = lambda *args: called.append(1) or run(*args)  # noqa: E731
    monkeypatch.setattr(cuda.causal_conv1d_linear, "causal_conv1d_linear", counted)
    found = results()
    assert len(called) == 6
    monkeypatch.setattr(cuda.causal_conv1d_linear, "ROWS_MEANWHILE", 1000)
    expected = results()
    assert len(called) == 6
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=2**-6, atol=2**-6 * float(truth.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_kernels(backend: str, dtype: torch.dtype) -> None:
    assert_accurate(silu, case(dtype=dtype), backend)
    absent = case(channels=17, columns=5, dtype=dtype, absent=("bias", "initial_state"))
    documents = (torch.rand(2, 35) < 0.2).cumsum(1)
    assert_accurate(causal_conv1d_linear, {**absent, "seq_idx": documents}, backend)


def test_nothing_to_convolve(backend: str) -> None:
    for batch, seqlen in ((0, 5), (2, 0)):
        inputs = case(batch, seqlen, absent=("initial_state",))
        y, state, product = silu(**on_device_of(backend, inputs), backend=backend)
        assert y.shape == (batch, seqlen, 128)
        assert state.shape == (batch, 128, 3)
        assert product.shape == (batch, seqlen, 24)
