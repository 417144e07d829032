"""The commands that use a model, on one that has just been trained."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambakit.cli.main import main
from mambakit.train.metrics import read_log

Call = Callable[..., Any]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs a command that succeeds and gives what it printed, `out` and `err`."""

    def run(*args: object, stdin: str = "") -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        assert main([str(arg) for arg in args]) == 0
        return capsys.readouterr()

    return run


def number(name: str, text: str) -> float:
    (found,) = re.findall(rf"^{name} +([\d.,]+)$", text, re.MULTILINE)
    return float(found.replace(",", ""))


def test_a_run_leaves_what_it_says(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {"checkpoints", "config.toml", "log.jsonl", "loss.png", "tensorboard"}
    checkpoints = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert checkpoints == ["step-00000027", "step-00000030"]
    losses = [
        r["valid_loss_nats"] for r in read_log(trained / "log.jsonl") if "valid_loss_nats" in r
    ]
    assert losses == sorted(losses, reverse=True)


def test_evaluate_repeats_the_last_validation(call: Call, trained: Path, tokens: Path) -> None:
    out = call("evaluate", "--checkpoint", trained, tokens, "--seqlen", 32).out
    last = read_log(trained / "log.jsonl")[-1]
    assert number("nats per token", out) == pytest.approx(last["valid_loss_nats"], abs=2e-4)
    assert number("perplexity", out) == pytest.approx(last["valid_perplexity"], rel=1e-3)
    assert number("bits per byte", out) == pytest.approx(last["valid_bits_per_byte"], abs=2e-4)


def test_evaluate_takes_text(call: Call, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("line 3: 9 is the square of 3\n", encoding="utf-8")
    checkpoint = trained / "checkpoints" / "step-00000027"
    out = call("evaluate", "--checkpoint", checkpoint, tmp_path / "text.txt").out
    assert number("tokens", out) == 29
    assert number("bytes", out) == 28
    assert number("perplexity", out) == pytest.approx(
        math.exp(number("nats per token", out)), rel=1e-3
    )


def test_generate_continues_a_prompt_the_same_way_with_a_seed(call: Call, trained: Path) -> None:
    args = ("generate", "--checkpoint", trained, "--max-tokens", 20, "--seed", 3)
    first = call(*args, "--prompt", "line ").out
    assert first.startswith("line ")
    assert len(first) > len("line \n")
    assert call(*args, stdin="line \n").out == first


def test_generate_continues_several_prompts_like_each_alone(
    call: Call, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text("the square", encoding="utf-8")
    args = ("generate", "--checkpoint", trained, "--max-tokens", 12, "--temperature", 0)
    alone = [call(*args, "--prompt", prompt).out for prompt in ("line 1", "the square")]
    file = ("--prompt-file", tmp_path / "prompt.txt")
    together = call(*args, "--prompt", "line 1", *file).out
    assert together == "\n---\n\n".join(alone)


def test_generate_runs_as_a_module(trained: Path) -> None:
    args = ["generate", "--checkpoint", str(trained), "--prompt", "line", "--max-tokens", "3"]
    command = [sys.executable, "-m", "mambakit", *args]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("line")


def test_a_terminal_without_the_characters_shows_others(trained: Path) -> None:
    args = ["generate", "--checkpoint", str(trained), "--prompt", "é→", "--max-tokens", "1"]
    command = [sys.executable, "-m", "mambakit", *args]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, encoding="ascii", env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("??")


def test_samples_are_shown_and_logged_while_training(
    call: Call, train_command: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    samples = ("--sample-every", 20, "--sample-prompt", "line 7")
    result = call(*train_command(tmp_path / "run"), *samples)
    (record,) = [r for r in read_log(tmp_path / "run" / "log.jsonl") if "sample" in r]
    assert record["step"] == 20
    assert record["sample"].startswith("line 7")
    assert "sample at step 20" in result.err
