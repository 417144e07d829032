from functools import partial

import pytest
import torch
from accuracy import assert_accurate, widen
from torch.nn.functional import cross_entropy

from mambakit.ops import linear_cross_entropy
from mambakit.ops.cpu import cross_entropy as cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 7, 1000], ids=lambda rows: f"{rows} rows a block")
def test_parity(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int) -> None:
    monkeypatch.setattr(cpu, "LOGITS_BYTES", 4 * 37 * block)
    targets = torch.randint(0, 37, (3, 5))
    targets[1, :2] = -100
    inputs = {"hidden": torch.randn(3, 5, 16).to(dtype), "weight": torch.randn(37, 16)}
    assert_accurate(partial(linear_cross_entropy, targets=targets), inputs, "cpu")


def test_other_ignore_index() -> None:
    targets = torch.tensor([0, 5, 5, 3])
    inputs = {"hidden": torch.randn(4, 6), "weight": torch.randn(9, 6)}
    assert_accurate(partial(linear_cross_entropy, targets=targets, ignore_index=5), inputs, "cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equals_torch(backend: str) -> None:
    hidden, weight = torch.randn(700, 6), torch.randn(9, 6)
    targets = torch.randint(0, 9, (700,))
    loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
    torch.testing.assert_close(loss, cross_entropy(hidden @ weight.t(), targets))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_counts(backend: str) -> None:
    hidden, weight = torch.randn(2, 6), torch.randn(9, 6)
    for rows in (0, 2):
        targets = torch.full((rows,), -100)
        assert linear_cross_entropy(hidden[:rows], weight, targets, backend=backend).isnan()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_multiplies_in_bfloat16(backend: str) -> None:
    """The same numbers as from inputs that were rounded by hand."""
    hidden, weight = torch.randn(20, 64), torch.randn(50, 64)
    targets = torch.randint(0, 50, (20,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
    rounded = linear_cross_entropy(hidden.bfloat16(), weight, targets, backend=backend)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, rounded)
    assert loss != linear_cross_entropy(hidden, weight, targets, backend=backend)


def test_reference_gradients_twice() -> None:
    hidden, weight = (widen(torch.randn(s)).requires_grad_() for s in ((3, 2), (4, 2)))
    targets = torch.tensor([1, -100, 3])

    def function(*values: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(*values, targets, backend="reference")

    assert torch.autograd.gradcheck(function, (hidden, weight))
    assert torch.autograd.gradgradcheck(function, (hidden, weight))
