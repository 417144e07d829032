"""Two processes train what one does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mambakit.cli.main import main
from mambakit.models import load_model
from mambakit.train.checkpointing import find_model


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
def test_two_processes_share_the_batch_of_one(
    train_command: Callable[[Path], list[str]], trained: Path, tmp_path: Path, lora: bool
) -> None:
    if lora:
        pytest.importorskip("peft")
    alone, together = tmp_path / "alone", tmp_path / "together"
    steps = ["--steps", "4", "--accumulation", "2", "--lr", "1e-3"]
    steps += ["--init-from", str(trained), "--lora"] if lora else []
    assert main([*train_command(alone), *steps]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", "-m", "mambakit", *train_command(together)]
    result = subprocess.run(
        [*command, *steps, "--batch-size", "1"], capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 4 of 4 is saved") == 1
    models = [load_model(find_model(run)) for run in (alone, together)]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert find_model(together).joinpath("adapter_config.json").exists() == lora
    logs = [(run / "log.jsonl").read_text(encoding="utf-8") for run in (alone, together)]
    first, second = (json.loads(log.splitlines()[0]) for log in logs)
    assert first["tokens"] == second["tokens"] == 2 * 2 * 2 * 32
    assert abs(first["train_loss_nats"] - second["train_loss_nats"]) < 1e-4
