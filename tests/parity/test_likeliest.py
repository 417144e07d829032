import pytest
import torch

from mambakit.errors import DtypeError, ShapeError
from mambakit.ops.likeliest import NOT_FINITE, likeliest

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("size", [1, 7, 8, 31, 1000, 1024, 8192, 8200, 50277])
@pytest.mark.parametrize("rows", [1, 3, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_of_the_largest(backend: str, dtype: torch.dtype, rows: int, size: int) -> None:
    logits = torch.randn(rows, size).to(dtype)
    logits[:, size // 2 : size // 2 * 2] = logits[:, : size // 2]  # so that there are two of each
    expected = likeliest(logits, backend="reference")
    found = likeliest(logits.to(backend), backend=backend)
    assert torch.equal(found.cpu(), expected)
    first = (logits == logits.max(-1, keepdim=True).values).int().argmax(-1)
    assert torch.equal(expected, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_are_not_finite(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(5, 3000)
    logits[0, 2999], logits[1, 7], logits[2], logits[3, :2999] = NAN, INF, -INF, -INF
    logits[4, 5] = 100
    found = likeliest(logits.to(backend, dtype), backend=backend)
    assert found.tolist() == [NOT_FINITE, NOT_FINITE, NOT_FINITE, 2999, 5]
    assert found.dtype == torch.int64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_a_part_of_the_columns(backend: str, dtype: torch.dtype) -> None:
    wide = torch.randn(4, 2008).to(backend, dtype)
    for first, last in ((0, 1999), (1, 2000), (8, 2008)):
        part = wide[:, first:last]
        assert torch.equal(likeliest(part), likeliest(part.contiguous()))
    assert torch.equal(likeliest(wide.t()), likeliest(wide.t().contiguous()))


def test_no_rows(backend: str) -> None:
    assert likeliest(torch.zeros(0, 5, device=backend)).shape == (0,)


def test_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="logits"):
        likeliest(torch.zeros(5))
    with pytest.raises(DtypeError, match="logits"):
        likeliest(torch.zeros(5, 5, dtype=torch.int64))
