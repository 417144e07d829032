import importlib
from functools import partial

import pytest
import torch
from accuracy import Tensors, assert_accurate, device_of, widen
from torch.nn.functional import cross_entropy

from mambakit.ops import linear_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["cpu", "reference", pytest.param("cuda", marks=pytest.mark.gpu)]
DRAWS = 30
"""The loss is one number, whose error is chance."""


def case(rows: tuple[int, ...], vocab: int, width: int, dtype: torch.dtype) -> Tensors:
    return {
        "hidden": torch.randn(*rows, width).to(dtype),
        "weight": torch.randn(vocab, width) / width**0.5,
        "targets": torch.randint(0, vocab, rows),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 7, 1000], ids=lambda rows: f"{rows} rows a block")
def test_parity(
    backend: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int
) -> None:
    module = importlib.import_module(f"mambakit.ops.{backend}.cross_entropy")
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * 37 * block)
    draws = [case((3, 5), 37, 16, dtype) for _ in range(DRAWS)]
    for inputs in draws:
        inputs["targets"][1, :2] = -100
    assert_accurate(linear_cross_entropy, draws, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab", "width"), [(1, 2, 3), (129, 1003, 96), (300, 9, 130)])
def test_sizes(backend: str, dtype: torch.dtype, rows: int, vocab: int, width: int) -> None:
    draws = [case((rows,), vocab, width, dtype) for _ in range(DRAWS)]
    assert_accurate(linear_cross_entropy, draws, backend)


def test_other_ignore_index(backend: str) -> None:
    draws = [case((4,), 9, 6, torch.float32) for _ in range(DRAWS)]
    for inputs in draws:
        inputs["targets"][:] = torch.tensor([0, 5, 5, 3])
    assert_accurate(partial(linear_cross_entropy, ignore_index=5), draws, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torch(backend: str) -> None:
    with device_of(backend):
        hidden, weight = torch.randn(700, 6), torch.randn(9, 6)
        targets = torch.randint(0, 9, (700,))
    loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
    torch.testing.assert_close(loss, cross_entropy(hidden @ weight.t(), targets))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_counts(backend: str) -> None:
    with device_of(backend):
        hidden, weight, ignored = torch.randn(2, 6), torch.randn(9, 6), torch.full((2,), -100)
    for rows in (0, 2):
        targets = ignored[:rows]
        assert linear_cross_entropy(hidden[:rows], weight, targets, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_multiplies_in_bfloat16(backend: str) -> None:
    """The same numbers as from inputs that were rounded by hand."""
    with device_of(backend):
        hidden, weight = torch.randn(20, 64), torch.randn(50, 64)
        targets = torch.randint(0, 50, (20,))
    with torch.autocast(hidden.device.type, torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
    rounded = linear_cross_entropy(hidden.bfloat16(), weight, targets, backend=backend)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, rounded)
    assert loss != linear_cross_entropy(hidden, weight, targets, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_one_gradient_of_two(backend: str, which: str) -> None:
    """A frozen head, or frozen layers below it."""
    with device_of(backend):
        hidden, weight = torch.randn(20, 6), torch.randn(9, 6)
        targets = torch.randint(0, 9, (20,))
    found = []
    for wanted in (["hidden", "weight"], [which]):
        leaves = {"hidden": hidden.clone(), "weight": weight.clone()}
        for name in wanted:
            leaves[name].requires_grad_()
        linear_cross_entropy(**leaves, targets=targets, backend=backend).backward()
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == wanted
        found.append(leaves[which].grad)
    assert torch.equal(*found)


def test_reference_gradients_twice() -> None:
    hidden, weight = (widen(torch.randn(s)).requires_grad_() for s in ((3, 2), (4, 2)))
    targets = torch.tensor([1, -100, 3])

    def function(*values: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(*values, targets, backend="reference")

    assert torch.autograd.gradcheck(function, (hidden, weight))
    assert torch.autograd.gradgradcheck(function, (hidden, weight))
