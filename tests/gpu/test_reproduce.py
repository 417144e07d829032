"""The experiments on a GPU: steps within a CUDA graph are the steps of the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mambakit.models.config import MambaConfig
from mambakit.reproduce import Contestant, Draws, InductionHeads, Recipe, SelectiveCopying
from mambakit.reproduce.attention import AttentionConfig
from mambakit.reproduce.induction_heads import EXPERIMENT
from mambakit.reproduce.training import Training

pytestmark = pytest.mark.gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")
RECIPE = Recipe(
    seqlen=20, batch_size=3, lr=1e-3, steps=40, steps_per_call=2, log_every=20, validate_every=20,
    validation_lengths=(20,), validation_sequences=5, target=100.0, hold=0, test_lengths=(20,),
    test_sequences=5,
)  # fmt: skip
MAMBA = MambaConfig(d_model=16, n_layer=2, d_state=4, vocab_size=8, tie_embeddings=False)
MODELS = {
    "mamba": MAMBA,
    "h3": dataclasses.replace(MAMBA, block="h3"),
    "ungated": dataclasses.replace(MAMBA, block="ungated"),
    "real": dataclasses.replace(MAMBA, selective=()),
    "complex": dataclasses.replace(MAMBA, selective=(), A_init="s4d-lin"),
    "attention": AttentionConfig(d_model=16, n_head=2, vocab_size=8, positions="xpos"),
}
TASKS = [InductionHeads(8), SelectiveCopying(8, 4)]


@pytest.mark.parametrize("task", TASKS, ids=["induction heads", "selective copying"])
def test_data_is_the_same(task):
    cpu = task.make(Draws(5, 0, torch.arange(7, 11)), 3, 50)
    gpu = task.make(Draws(5, 0, torch.arange(7, 11, device=GPU)), 3, 50)
    assert torch.equal(cpu.tokens, gpu.tokens.cpu())
    assert torch.equal(cpu.targets, gpu.targets.cpu())


@pytest.mark.parametrize("task", TASKS, ids=["induction heads", "selective copying"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_the_cpu_and_a_run_goes_on(name, task, tmp_path: Path):
    contestant = Contestant(title="", model=MODELS[name], recipe=RECIPE)
    cpu = Training(task, contestant, tmp_path / "cpu", CPU)
    gpu = Training(task, contestant, tmp_path / "gpu", GPU)
    cpu.go_on()
    gpu.go_on()  # 3 calls without the graph, 7 with it.
    assert gpu.loss == pytest.approx(cpu.loss, rel=1e-3)
    again = Training(task, contestant, tmp_path / "gpu", GPU)
    assert again.step == 20
    for training in (cpu, gpu, again):
        training.go_on()
    assert gpu.loss == pytest.approx(cpu.loss, rel=1e-2)
    assert again.loss == pytest.approx(gpu.loss, rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_follows_float32(name, tmp_path: Path):
    recipe = dataclasses.replace(RECIPE, precision="bfloat16")
    pair = [
        Training(
            TASKS[1],
            Contestant(title="", model=MODELS[name], recipe=r),
            tmp_path / r.precision,
            GPU,
        )
        for r in (RECIPE, recipe)
    ]
    for _ in range(2):
        for training in pair:
            training.go_on()
        assert pair[1].loss == pytest.approx(pair[0].loss, rel=2e-2)
        assert pair[1].loss != pair[0].loss


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_learns_in_a_graph_of_many_steps(precision, tmp_path: Path):
    """From chance, 14 %, to nearly everything: what compares losses near ln V alone would not see stale weights."""
    contestant = EXPERIMENT.quick["mamba"]
    recipe = dataclasses.replace(contestant.recipe, steps_per_call=10, precision=precision)
    contestant = dataclasses.replace(contestant, recipe=recipe)
    training = Training(EXPERIMENT.quick_task, contestant, tmp_path, GPU)
    while not training.is_done:
        training.go_on()
    assert training.history[-1]["accuracy_percent"] > 95
