from __future__ import annotations

import pytest
import torch
from accuracy import device_of, error
from torch import Tensor

from mambakit.errors import ArgumentError, BackendError, DtypeError, ShapeError
from mambakit.ops.cpu import quantised_linear as cpu
from mambakit.ops.cuda import quantised_linear as cuda
from mambakit.ops.quantisation import QuantisedWeight, dequantise, quantise_weight
from mambakit.ops.quantised_linear import quantised_linear

FORMS = [(bits, group_size) for bits in (8, 4) for group_size in (32, 64, 128)]
SIZES = [(1, 1), (7, 48), (130, 64), (33, 100), (80, 1536), (400, 130), (65, 192)]
"""(O, K): one, groups that do not divide, odd sizes."""
ROWS = [0, 1, 3, 8, 70]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def make(
    backend: str, rows: int, size: tuple[int, int], bits: int, group_size: int
) -> tuple[Tensor, QuantisedWeight, Tensor]:
    torch.manual_seed(0)
    outputs, columns = size
    weight = quantise_weight(torch.randn(outputs, columns), bits, group_size)
    device = device_of(backend)
    codes, scales = weight.codes.to(device), weight.scales.to(device)
    x, bias = torch.randn(rows, columns), torch.randn(outputs)
    return x.to(device), QuantisedWeight(codes, scales, columns), bias.to(device)


def exact(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    y = x.double() @ dequantise(weight, torch.float64).T
    return y if bias is None else y + bias.double()


def bound(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """How far the integer product may be from the exact one, (B, O).

    Half a step of x, max |x| / 32767, for every number of a group; beside that, float32 roundings
    of a sum over groups, of each group's sum and scale, of the lanes, and of the bias.
    """
    w = dequantise(weight, torch.float64).abs()
    padding = (0, weight.padded_columns - weight.columns)
    groups = (-1, weight.group_size)
    size, w_groups = (
        torch.nn.functional.pad(t, padding).unflatten(1, groups) for t in (x.double().abs(), w)
    )
    steps = size.amax(-1) / 32767
    # Rounding happens after a division and a multiplication in float32, so a little beside half a step.
    rounding = 0.501 * torch.einsum("bg,og->bo", steps, w_groups.sum(-1))
    whole = x.double().abs() @ w.T + (0 if bias is None else bias.double().abs())
    return rounding + (w_groups.shape[1] + 12) * 2**-24 * whole


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_the_integer_product_is_within_its_bound(bits, group_size, size, rows) -> None:
    x, weight, bias = make("cpu", rows, size, bits, group_size)
    bias = bias if rows != 3 else None
    y = quantised_linear(x, weight, bias, backend="cpu")
    assert y.shape == (rows, size[0])
    assert y.dtype == torch.float32
    assert ((y.double() - exact(x, weight, bias)).abs() <= bound(x, weight, bias)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_a_gpu_is_as_exact_as_the_reference(bits, group_size, size, rows, dtype) -> None:
    x, weight, bias = make("cuda", rows, size, bits, group_size)
    x, bias = x.to(dtype), bias.to(dtype) if rows != 3 else None
    y = quantised_linear(x, weight, bias, backend="cuda")
    reference = quantised_linear(x, weight, bias, backend="reference")
    truth = exact(x, weight, bias)
    assert y.shape == reference.shape
    assert y.dtype == dtype
    allowed = 2 * error(reference, truth) + torch.finfo(torch.float32).eps
    assert error(y, truth) <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_a_gpu_makes_the_same_matrix(bits, group_size, size, dtype) -> None:
    _, weight, _ = make("cuda", 1, size, bits, group_size)
    assert torch.equal(cuda._dequantise(weight, dtype), dequantise(weight, dtype))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_a_cpu_makes_the_same_matrix(bits, group_size, size) -> None:
    _, weight, _ = make("cpu", 1, size, bits, group_size)
    assert torch.equal(cpu._dequantise(weight), dequantise(weight, torch.float32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [2, 70])
def test_dtypes(backend, rows, dtype) -> None:
    x, weight, bias = make(backend, rows, (33, 100), 8, 64)
    y = quantised_linear(x.to(dtype), weight, bias.to(dtype), backend=backend)
    assert y.dtype == dtype
    truth = exact(x.to(dtype), weight, bias.to(dtype))
    assert error(y, truth) <= torch.finfo(dtype).eps + 1e-4


def test_leading_dimensions_and_strides(backend) -> None:
    x, weight, bias = make(backend, 12, (33, 50), 4, 32)
    expected = quantised_linear(x, weight, bias, backend=backend)
    wide = torch.zeros(12, 101, device=x.device)
    wide[:, 1::2] = x
    assert torch.equal(quantised_linear(wide[:, 1::2], weight, bias, backend=backend), expected)
    shaped = quantised_linear(x.view(2, 6, 50), weight, bias, backend=backend)
    assert torch.equal(shaped, expected.view(2, 6, 33))
    one = quantised_linear(x[0], weight, bias, backend=backend)
    torch.testing.assert_close(one, expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_the_others(backend, bits) -> None:
    x, weight, _ = make(backend, 8, (600, 500), bits, 64)
    together = quantised_linear(x, weight, backend=backend)
    for row in range(8):
        alone = quantised_linear(x[row : row + 1], weight, backend=backend)
        assert torch.equal(alone[0], together[row])


def test_threads_do_not_change_the_result(monkeypatch) -> None:
    x, weight, bias = make("cpu", 3, (600, 500), 8, 64)
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "SMALL", 0)
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(quantised_linear(x, weight, bias, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(backend, value) -> None:
    x, weight, _ = make(backend, 2, (5, 100), 8, 64)
    x[1, 70] = value
    y = quantised_linear(x, weight, backend=backend)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


def test_zeros_and_extremes() -> None:
    x, weight, bias = make("cpu", 3, (5, 130), 8, 32)
    x[0], x[1], x[2] = 0, x[1] * 1e-30, x[2] * 1e30
    y = quantised_linear(x, weight, bias, backend="cpu")
    assert torch.equal(y[0], bias)
    assert ((y.double() - exact(x, weight, bias)).abs() <= bound(x, weight, bias)).all()


def test_a_gradient_is_the_reference_s() -> None:
    x, weight, bias = make("cpu", 2, (5, 100), 4, 64)
    x.requires_grad_()
    quantised_linear(x, weight, bias).sum().backward()
    expected = dequantise(weight, torch.float32).sum(0).expand(2, 100)
    torch.testing.assert_close(x.grad, expected)
    with pytest.raises(BackendError, match=r"backend 'cpu' cannot run .* under torch\.no_grad\(\)"):
        quantised_linear(x, weight, bias, backend="cpu")


def test_compiled_it_is_the_reference() -> None:
    x, weight, bias = make("cpu", 2, (5, 100), 4, 64)

    def product(x: Tensor) -> Tensor:
        return quantised_linear(x, weight, bias)

    compiled = torch.compile(product, fullgraph=True, backend="eager")
    expected = quantised_linear(x, weight, bias, backend="reference")
    assert torch.equal(compiled(x), expected)


def test_wrong_arguments() -> None:
    x, weight, bias = make("cpu", 2, (5, 100), 8, 64)
    with pytest.raises(ShapeError, match=r"x: got shape \(2, 99\), wanted .* = \(2, 100\)"):
        quantised_linear(x[:, 1:], weight)
    with pytest.raises(ShapeError, match=r"bias: got shape \(4,\), wanted \(O,\) = \(5,\)"):
        quantised_linear(x, weight, bias[1:])
    with pytest.raises(DtypeError, match="x: got dtype"):
        quantised_linear(x.long(), weight)
    with pytest.raises(ArgumentError, match="x: is on|codes: is on"):
        quantised_linear(x.to("meta"), weight)


def test_warps_share_numbers_of_x_only_if_there_are_enough() -> None:
    assert cuda.outputs_of_warp(3072, 132) == 1
    assert cuda.outputs_of_warp(8192, 132) == 2
    assert cuda.outputs_of_warp(50280, 132) == 4
