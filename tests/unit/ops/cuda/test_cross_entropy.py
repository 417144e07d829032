"""The PyTorch side of the op, with its kernel written again in PyTorch; the kernel itself is tested on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as by_torch

from mambakit.ops.cuda import cross_entropy as cuda


def kernel(file: str, name: str, device: torch.device, **constants: Any) -> Callable[..., None]:
    """What the kernel does, on the CPU."""
    assert (file, name) == ("cross_entropy.cu", "cross_entropy")

    def run(
        grid: int, block: int, logits: Tensor, targets: Tensor, losses: Tensor, vocab: int, stride: int,
        ignore_index: int, kept: int, *, shared: int,
    ) -> None:  # fmt: skip
        assert grid == len(logits) == len(targets) == len(losses)
        assert (block, shared) == (cuda.THREADS, 16 * kept)
        assert logits.shape[1] == vocab <= stride == logits.stride(0)
        assert stride * logits.element_size() % 16 == logits.data_ptr() % 16 == 0
        assert targets.is_contiguous()
        losses.copy_(by_torch(logits.float(), targets, ignore_index=ignore_index, reduction="none"))
        if constants["GRADIENTS"]:
            counted = targets != ignore_index
            gradient = logits.float().softmax(1)
            gradient[counted, targets[counted]] -= 1
            logits.copy_(gradient * counted[:, None])

    return run


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
        out.copy_(left.float() @ right.float())

    def multiply_add(left: Tensor, right: Tensor, total: Tensor) -> None:
        total += left.float() @ right.float()

    monkeypatch.setattr(cuda, "kernel", kernel)
    monkeypatch.setattr(cuda, "_shared_bytes", lambda device: 1000)
    monkeypatch.setattr(cuda, "multiply_add", multiply_add)
    monkeypatch.setattr(cuda, "multiply", multiply)


def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss, *saved = cuda._run_forward(hidden, weight, targets, -100, True, True)
    return loss, *cuda._run_backward(torch.tensor(3.0), *saved, weight.dtype)


@pytest.mark.parametrize("block_bytes", [1, 10_000, 2**30])
@pytest.mark.parametrize("vocab", [37, 64])
def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, block_bytes: int, vocab: int) -> None:
    monkeypatch.setattr(cuda, "LOGITS_BYTES", block_bytes)
    hidden = torch.randn(90, 16, requires_grad=True)
    weight = torch.randn(vocab, 16, requires_grad=True)
    targets = torch.randint(0, vocab, (180,))[::2]
    targets[5:9] = -100
    truth = by_torch(hidden @ weight.t(), targets)
    gradients = torch.autograd.grad(3 * truth, (hidden, weight))
    with torch.no_grad():
        found = run(hidden, weight, targets)
    for ours, theirs in zip(found, (truth, *gradients), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Float32 sums and weight gradient; a count that is no power of two scales exactly."""
    hidden, weight, targets = torch.randn(700, 16).to(dtype), torch.randn(37, 16), torch.arange(700)
    targets %= 37
    loss, dhidden, dweight = run(hidden, weight, targets)
    leaves = [hidden.double().requires_grad_(), weight.to(dtype).double().requires_grad_()]
    truth = 3 * by_torch(leaves[0] @ leaves[1].t(), targets)
    assert (loss.dtype, dhidden.dtype, dweight.dtype) == (torch.float32, dtype, torch.float32)
    for ours, theirs in zip((dhidden, dweight), torch.autograd.grad(truth, leaves), strict=True):
        assert (ours - theirs).norm() < 2 * torch.finfo(dtype).eps * theirs.norm()


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_counts(rows: int) -> None:
    targets = torch.full((rows,), -100)
    loss, dhidden, dweight = run(torch.randn(rows, 6), torch.randn(9, 6), targets)
    assert loss.isnan()
    assert torch.equal(dhidden, torch.zeros(rows, 6))
    assert torch.equal(dweight, torch.zeros(9, 6))


@pytest.mark.parametrize("asked", [(False, False), (True, False), (False, True)])
def test_gradients_that_nobody_asks_for_are_not_made(asked: tuple[bool, bool]) -> None:
    hidden, weight = torch.randn(5, 6), torch.randn(9, 6)
    arguments = (torch.arange(5), -100, *asked)
    _, dhidden, dweight, counted = cuda._run_forward(hidden, weight, *arguments)
    assert (dhidden.numel(), dweight.numel()) == (30 * asked[0], 54 * asked[1])
    assert counted == 5


def test_fakes_have_the_shapes_of_the_real() -> None:
    hidden, weight, targets = torch.randn(5, 6).bfloat16(), torch.randn(9, 6), torch.arange(5)
    for asked in ((True, True), (False, False)):
        real = cuda._run_forward(hidden, weight, targets, -100, *asked)
        fake = cuda._forward(hidden.to("meta"), weight.to("meta"), targets.to("meta"), -100, *asked)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    real = cuda._run_backward(real[0], *real[1:], torch.float32)
    fake = cuda._backward(fake[0], *fake[1:], torch.float32)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize(("rows", "wanted"), [(65536, 9472), (16384, 8192), (10, 256), (0, 1)])
def test_rows_of_a_block(rows: int, wanted: int) -> None:
    block = cuda.rows_of_block(rows, 2 * 50280)
    assert block == wanted
    assert block * 2 * 50280 <= cuda.LOGITS_BYTES


def test_a_row_larger_than_all_memory_for_logits() -> None:
    assert cuda.rows_of_block(100, 2**31) == 1
