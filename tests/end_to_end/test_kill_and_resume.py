"""Real processes, really stopped: what is left goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mambakit.cli.main import main

# A trainer that takes its time over each checkpoint, so that a kill can hit it there.
SLOW_SAVE = """
import sys, time
from mambakit.train import checkpointing
save = checkpointing.save_model
checkpointing.save_model = lambda *args: (save(*args), time.sleep(0.1))
from mambakit.cli.main import main
sys.exit(main())
"""

Command = Callable[[Path], list[str]]


def start(args: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_SAVE, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_new(process: subprocess.Popen[str], run: Path, pattern: str) -> None:
    """Wait until the process makes a folder that was not there."""
    before = set((run / "checkpoints").glob(pattern))
    while not set((run / "checkpoints").glob(pattern)) - before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def assert_like(run: Path, whole: Path) -> None:
    """The runs ended with the same weights and logged the same losses."""
    name = Path("checkpoints", "step-00000030", "model.safetensors")
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert losses(run) == losses(whole)
    assert not list((run / "checkpoints").glob(".*"))


def losses(run: Path) -> list[tuple[int, float]]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["valid_loss_nats"]) for r in records if "valid_loss_nats" in r]


def test_a_run_killed_again_and_again_ends_bit_for_bit_the_same(
    train_command: Command, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for moment in ("in the first save", "in a later save", "anywhere"):
        before = steps(run)
        process = start(train_command(run))
        if moment == "anywhere":
            wait_for_new(process, run, "step-*")
            time.sleep(random.uniform(0, 0.4))
        else:
            wait_for_new(process, run, ".step-*.partial")
            if moment == "in a later save":
                wait_for_new(process, run, ".step-*.partial")
        process.kill()
        process.communicate()
        if moment == "in the first save":
            assert steps(run) == []
            assert list((run / "checkpoints").glob(".step-*.partial"))
        else:
            assert steps(run) > before
        assert 30 not in steps(run), "killed too late to test anything"
    assert main(train_command(run)) == 0
    assert_like(run, trained)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
@pytest.mark.parametrize(("which", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_asked_to_stop_saves_and_goes_on(
    train_command: Command,
    trained: Path,
    tmp_path: Path,
    which: signal.Signals,
    code: int,
) -> None:
    run = tmp_path / "run"
    process = start(train_command(run))
    wait_for_new(process, run, "step-*")
    process.send_signal(which)
    out, err = process.communicate()
    assert process.returncode == code
    assert "finishing this step and saving; Ctrl-C again stops at once" in err
    stopped = steps(run)[-1]
    assert 3 <= stopped < 30
    assert f"step {stopped} of 30 is saved in {run}" in out
    assert main(["train", "--config", str(run / "config.toml")]) == 0
    assert_like(run, trained)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
def test_ctrl_c_twice_stops_at_once(train_command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(train_command(run))
    wait_for_new(process, run, "step-*")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "Ctrl-C again" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "error: interrupted"
    assert 30 not in steps(run)
    assert not list((run / "checkpoints").glob(".*"))


def test_a_full_disk_keeps_the_last_checkpoint(
    train_command: Command, trained: Path, tmp_path: Path
) -> None:
    pytest.importorskip("resource", reason="Windows has no limit to set")
    # The system refuses files above a size from the second checkpoint on.
    code = """
import resource, sys
from mambakit.train import checkpointing
save = checkpointing.save_model
def limited(model, folder):
    if "00000006" in str(folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    save(model, folder)
checkpointing.save_model = limited
from mambakit.cli.main import main
sys.exit(main())
"""
    run = tmp_path / "run"
    command = [sys.executable, "-c", code, *train_command(run)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: step 6 could not be saved: ")
    assert last.endswith(f"the last good checkpoint is {run / 'checkpoints' / 'step-00000003'}")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert main(train_command(run)) == 0
    assert_like(run, trained)
