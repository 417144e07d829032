from __future__ import annotations

import pytest
import torch

from mambakit.errors import ArgumentError, BackendError, DtypeError, ShapeError
from mambakit.ops.cpu import linear as cpu
from mambakit.ops.linear import linear_step


def make(batch: int, inputs: int, outputs: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(batch, inputs), torch.randn(outputs, inputs), torch.randn(outputs)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Rows of each product that the compiled kernel computes."""
    rows, run = [], cpu.linear_step

    def recorded(x, weight, bias):
        rows.append(x.shape[0])
        return run(x, weight, bias)

    monkeypatch.setattr(cpu, "linear_step", recorded)
    return rows


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 63, 130), (3, 17, 5), (8, 768, 400), (0, 4, 3)])
def test_product(calls, shape, has_bias):
    x, weight, bias = make(*shape)
    bias = bias if has_bias else None
    y = linear_step(x, weight, bias)
    exact = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)
    assert calls == [shape[0]]


def test_bfloat16(calls):
    x, weight, bias = make(3, 300, 40)
    narrow = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    y = linear_step(*narrow)
    exact = narrow[0].double() @ narrow[1].double().T + narrow[2].double()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)
    assert calls == [3]


@pytest.mark.parametrize("outputs", [100, 1000])
def test_a_row_does_not_depend_on_the_others_nor_on_the_threads(outputs):
    x, weight, _ = make(21, 300, outputs)
    together = linear_step(x, weight)
    for row in range(21):
        assert torch.equal(linear_step(x[row : row + 1], weight)[0], together[row])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(linear_step(x, weight), together)
    finally:
        torch.set_num_threads(threads)


def test_strided_arguments():
    x, weight, _ = make(4, 30, 20)
    expected = linear_step(x[:, ::2].contiguous(), weight[:, ::2].contiguous())
    assert torch.equal(linear_step(x[:, ::2], weight[:, ::2]), expected)


def test_pytorch_computes_what_the_kernel_cannot(calls):
    x, weight, bias = make(2, 16, 24)
    wide = linear_step(x.double(), weight.double(), bias.double())
    assert wide.dtype == torch.float64
    assert linear_step(x.half(), weight.half()).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_step(x, weight).dtype == torch.bfloat16
    weight.requires_grad_()
    linear_step(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(24, 16))
    assert calls == []
    with torch.no_grad():
        linear_step(x, weight)
    assert calls == [2]


def test_wrong_arguments():
    x, weight, bias = make(2, 16, 24)
    with pytest.raises(ShapeError, match=r"x: got shape \(16,\), wanted \(B, K\)"):
        linear_step(x[0], weight)
    with pytest.raises(ShapeError, match=r"x: got shape \(2, 15\).*= \(2, 16\)"):
        linear_step(x[:, 1:], weight)
    with pytest.raises(ShapeError, match=r"bias: got shape \(23,\)"):
        linear_step(x, weight, bias[1:])
    with pytest.raises(DtypeError, match="weight: got dtype"):
        linear_step(x, weight.long())
    with pytest.raises(ArgumentError, match="weight: is on meta"):
        linear_step(x, weight.to("meta"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, w: (x.half(), w.half()), r"it is in torch\.float16"),
        (lambda x, w: (x, w.requires_grad_()), r"call it under torch\.no_grad"),
    ],
)
def test_a_named_backend_that_cannot(change, reason):
    x, weight, _ = make(1, 16, 24)
    with pytest.raises(BackendError, match=f"'cpu' cannot run this product: .*{reason}"):
        linear_step(*change(x, weight), backend="cpu")
