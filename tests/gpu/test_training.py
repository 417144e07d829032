"""What a training step keeps in a GPU's memory, and that it does not wait for the GPU."""

from __future__ import annotations

import gc
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

from mambakit.data import prepare
from mambakit.models import MambaConfig, MambaLanguageModel
from mambakit.nn import MambaMixer
from mambakit.nn import mixer as mixer_module
from mambakit.nn.joined_gradients import linear_beside, linear_in_halves
from mambakit.nn.linear import Linear
from mambakit.ops import linear_cross_entropy, scan_gradients
from mambakit.ops.cuda import causal_conv1d
from mambakit.ops.gradient_room import GradientRoom
from mambakit.ops.wide_products import WIDENS
from mambakit.train import TrainConfig, Trainer
from mambakit.train.step_graph import EAGER_STEPS, StepGraph

pytestmark = pytest.mark.gpu


@contextmanager
def waits() -> Iterator[list[str]]:
    """The calls within that wait for the GPU."""
    found: list[str] = []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]


def test_waits_are_noticed() -> None:
    with waits() as found:
        torch.ones(1, device="cuda").item()
    assert len(found) == 1


def collect_and_double(x: Tensor) -> Tensor:
    gc.collect()  # Python may do so at any time.
    return 2 * x


def test_a_graph_that_is_garbage_does_not_break_a_capture() -> None:
    x = torch.arange(3.0, device="cuda")
    old, new = StepGraph(collect_and_double), StepGraph(collect_and_double)
    for _ in range(EAGER_STEPS):
        new(x)
    for _ in range(EAGER_STEPS + 1):
        old(x)
    old.itself = old  # type: ignore[attr-defined]
    del old
    for _ in range(2):
        assert new(x).tolist() == [0, 2, 4]


def loss_inputs(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, 64, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(vocab, 64, device="cuda", requires_grad=True)
    return hidden, weight, torch.randint(vocab, (rows,), device="cuda")


def test_the_loss_waits_for_nothing() -> None:
    hidden, weight, targets = loss_inputs(300, 1003, torch.bfloat16)
    linear_cross_entropy(hidden, weight, targets).backward()
    with waits() as found:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert found == []


@pytest.mark.parametrize("wrong", [-1, 1003, 2**40])
def test_a_target_that_is_no_class_makes_the_loss_nan(wrong: int) -> None:
    hidden, weight, targets = loss_inputs(300, 1003, torch.bfloat16)
    targets[7] = wrong
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.isnan()
    assert weight.grad is not None
    assert weight.grad.isnan().all()
    assert hidden.grad is not None
    assert hidden.grad[7].isnan().all()
    assert hidden.grad[8].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [50280, 50277, 131_075])
def test_rows_that_shared_memory_holds_and_that_it_does_not(vocab: int, dtype: torch.dtype) -> None:
    inputs = {"hidden": torch.randn(40, 64).to(dtype), "weight": torch.randn(vocab, 64) / 4}
    targets = torch.randint(vocab, (40,), device="cuda")
    targets[:2] = torch.tensor([0, vocab - 1])

    def op(hidden: Tensor, weight: Tensor, backend: str) -> Tensor:
        where = targets.to(hidden.device)
        return linear_cross_entropy(hidden, weight, where, backend=backend)

    assert_accurate(op, [inputs], "cuda")


def test_the_loss_alone_is_the_loss_with_gradients() -> None:
    hidden, weight, targets = loss_inputs(300, 1003, torch.bfloat16)
    with torch.no_grad():
        alone = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(alone, linear_cross_entropy(hidden, weight, targets).detach())


def mixed(mixer: MambaMixer, hidden: Tensor) -> tuple[list[Tensor], int]:
    """The output with all gradients, and the bytes kept between forward and backward.

    Of three times the one in the middle: in one of several suites 130 KB of something else were counted too.
    """
    results, kept = zip(*(mixed_once(mixer, hidden) for _ in range(3)), strict=True)
    return results[0], sorted(kept)[1]


def mixed_once(mixer: MambaMixer, hidden: Tensor) -> tuple[list[Tensor], int]:
    leaves = [hidden, *mixer.parameters()]
    gc.collect()  # what other tests left would be counted when it goes
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        y = mixer(hidden)[0]
    kept = torch.cuda.memory_allocated() - before
    gradients = torch.autograd.grad(y.float().square().sum(), leaves)
    return [y.detach(), *gradients], kept


@pytest.mark.parametrize("norm_epsilon", [None, 1e-6])
def test_the_mixer_keeps_neither_x_nor_dt(
    monkeypatch: pytest.MonkeyPatch, norm_epsilon: float | None
) -> None:
    mixer = MambaMixer(64, norm_epsilon=norm_epsilon).cuda()
    hidden = torch.randn(4, 512, 64, device="cuda", requires_grad=True)
    mixed(mixer, hidden)
    ours, kept = mixed(mixer, hidden)
    monkeypatch.setattr(mixer_module, "RECOMPUTES_ON", ())
    theirs, kept_by_autograd = mixed(mixer, hidden)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert kept_by_autograd - kept == 2 * 2 * 128 * 4 * 512


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("d_model", [64, 33])
def test_gradients_of_x_and_z_are_one_matrix(
    monkeypatch: pytest.MonkeyPatch, d_model: int, is_half: bool
) -> None:
    """The same bits every time; and apart, the same but for what is rounded between two products."""
    parts, joined = list[int](), GradientRoom.joined

    def noted(room: GradientRoom, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found = joined(room, gradients)
        parts.append(len(found))
        return found

    monkeypatch.setattr(GradientRoom, "joined", noted)
    mixer = MambaMixer(d_model, bias=True).cuda()
    hidden = torch.randn(3, 70, d_model, device="cuda", requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16, enabled=is_half):
            y, state = mixer(hidden)
        loss = y.float().square().sum() + state.ssm_state.square().sum()
        return torch.autograd.grad(loss, [hidden, *mixer.parameters()])

    found, again = gradients(), gradients()
    for module in (scan_gradients, causal_conv1d):
        monkeypatch.setattr(module, "room_for", lambda *_: None)
    apart = gradients()
    assert parts == [1, 1, 2]
    for ours, same, truth in zip(found, again, apart, strict=True):
        assert torch.equal(ours, same)
        assert (ours - truth).norm() <= (1e-2 if is_half else 1e-5) * truth.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["alone", "in halves", "beside"])
def test_gradients_of_weights_are_sums_in_float32(kind: str, dtype: torch.dtype) -> None:
    """Of half-precision factors, and not rounded to these on the way to the optimizer."""
    layer = Linear(64, 96, bias=False).cuda()
    x = torch.randn(3, 100, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        if kind == "alone":
            y = layer(x)
        elif kind == "beside":
            y = linear_beside(x, layer.weight)[1]
        else:
            y = torch.cat(linear_in_halves(x, layer.weight, None), dim=-1)
    dy = torch.randn_like(y)
    dx, found = torch.autograd.grad(y, (x, layer.weight), dy)
    wide, rows = x.detach().to(dtype).double().flatten(0, 1), dy.double().flatten(0, 1)
    expected = rows.t() @ wide
    rounding = 2**-20 if WIDENS else 2**-8
    assert found.dtype == torch.float32
    assert (found - expected).norm() < rounding * expected.norm()
    expected = rows @ layer.weight.detach().to(dtype).double()
    assert (dx.flatten(0, 1) - expected).norm() < 2**-8 * expected.norm()


@pytest.mark.parametrize("norm_epsilon", [None, 1e-6])
def test_a_model_step_waits_for_nothing(norm_epsilon: float | None) -> None:
    config = MambaConfig(d_model=64, n_layer=2, vocab_size=300, mixer_norm_epsilon=norm_epsilon)
    model = MambaLanguageModel(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(300, (2, 2050), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with waits() as found:
        step()
    assert found == []


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    (tmp_path / "text.txt").write_text("all work and no play\n" * 500, encoding="utf-8")
    prepare(tmp_path / "text.txt", tmp_path / "tokens", valid_fraction=0.1)
    model = MambaConfig(d_model=64, n_layer=2, vocab_size=257)

    def make(**changes: object) -> Trainer:
        options = {"steps": 10, "batch_size": 2, "seqlen": 32, "device": "cuda", **changes}
        paths = {"data": tmp_path / "tokens", "out": tmp_path / "run"}
        return Trainer(TrainConfig(**paths, model=model, **options))  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_trainer_waits_once_a_step(
    make_trainer: Callable[..., Trainer], precision: str, accumulation: int
) -> None:
    trainer = make_trainer(precision=precision, accumulation=accumulation)
    trainer._train_step()
    with waits() as eager:
        trainer._train_step()
    for _ in range(EAGER_STEPS):
        trainer._train_step()
    with waits() as replayed:
        trainer._train_step()
    assert (len(eager), len(replayed)) == (1, 1)


@pytest.mark.parametrize("options", [{}, {"documents": True, "accumulation": 3}], ids=str)
def test_a_graph_trains_as_eager_code_does(
    make_trainer: Callable[..., Trainer], options: dict[str, object]
) -> None:
    """Bit for bit, with a learning rate and data that change every step, and through a checkpoint."""
    losses, weights = [], []
    for cuda_graph in (False, True):
        for steps in (6, 12):  # the second goes on from the first
            trainer = make_trainer(cuda_graph=cuda_graph, steps=steps, log_every=1, **options)
            trainer.fit()
        lines = (trainer.config.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        losses.append([line["train_loss_nats"] for line in found if "train_loss_nats" in line])
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
        shutil.rmtree(trainer.config.out)
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("steps_before", [1, EAGER_STEPS + 1])
def test_a_step_that_is_not_finite_changes_nothing(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, steps_before: int
) -> None:
    trainer = make_trainer(non_finite="skip", steps=10)
    monkeypatch.setattr(trainer, "_record", lambda values: None)
    for _ in range(steps_before):
        trainer._train_step()
    first = next(trainer.model.parameters())
    with torch.no_grad():
        kept = first[:, 0].clone()
        first[:, 0] = torch.nan
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer._train_step()
    for parameter, old in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter.nan_to_num(), old.nan_to_num())
    with torch.no_grad():
        first[:, 0] = kept
    assert math.isfinite(trainer._train_step())
