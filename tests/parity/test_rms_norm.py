import pytest
import torch
from accuracy import Tensors, assert_accurate, device_of, widen

from mambakit.ops import add_rms_norm, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2,), (17,), (3, 130), (2, 33, 64), (0, 5), (2049, 8)]
DRAWS = 20


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def draw() -> Tensors:
        return {"x": 3 * torch.randn(shape).to(dtype), "weight": torch.randn(shape[-1])}

    assert_accurate(rms_norm, [draw() for _ in range(DRAWS)], backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm(
    backend: str, dtype: torch.dtype, residual: torch.dtype, shape: tuple[int, ...]
) -> None:
    def draw() -> Tensors:
        return {
            "x": torch.randn(shape).to(dtype),
            "residual": 3 * torch.randn(shape).to(residual),
            "weight": torch.randn(shape[-1]),
        }

    assert_accurate(add_rms_norm, [draw() for _ in range(DRAWS)], backend)


def test_equals_torch(backend: str) -> None:
    with device_of(backend):
        x, weight = torch.randn(5, 24), torch.randn(24)
    expected = torch.nn.functional.rms_norm(x, (24,), weight, eps=0.1)
    torch.testing.assert_close(rms_norm(x, weight, eps=0.1, backend=backend), expected)


def test_transposed_input(backend: str) -> None:
    with device_of(backend):
        x, weight = torch.randn(24, 5).t(), torch.randn(24)
    assert torch.equal(
        rms_norm(x, weight, backend=backend), rms_norm(x.contiguous(), weight, backend=backend)
    )


def test_reference_gradients_twice() -> None:
    x, residual, weight = (widen(torch.randn(s)).requires_grad_() for s in ((2, 3), (2, 3), (3,)))

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return add_rms_norm(*values, backend="reference")

    assert torch.autograd.gradcheck(function, (x, residual, weight))
    assert torch.autograd.gradgradcheck(function, (x, residual, weight))
