"""Every example runs offline, in an empty folder, and says what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, folder: Path, *args: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *args]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_scan_by_hand_agrees_with_the_scan(tmp_path: Path) -> None:
    printed = run_example("scan_by_hand.py", tmp_path)
    errors = re.findall(r"(?:difference|whole:?) (\d\.\de[+-]\d+)", printed)
    assert len(errors) == 2
    assert max(map(float, errors)) < 1e-4


def test_quick_start_recites_what_it_learned(tmp_path: Path) -> None:
    printed = run_example("quick_start.py", tmp_path)
    assert "Beautiful is better than ugly.\nExplicit is better than implicit.\n" in printed


def test_stream_generation_ends_lines_at_the_stop_string(tmp_path: Path) -> None:
    printed = run_example("stream_generation.py", tmp_path)
    lines = printed.splitlines()[-4:]
    assert lines[0] == "Explicit is better than implicit."
    assert [line.split()[0] for line in lines] == ["Explicit", "In", "There", "If"]


def test_state_is_saved_and_branches(tmp_path: Path) -> None:
    printed = run_example("state_save_and_branch.py", tmp_path)
    assert printed.splitlines()[-2:] == [
        "Complex is better than complicated.",
        "Readability counts.",
    ]
    file = (tmp_path / "prefix.safetensors").stat().st_size
    [size] = re.findall(r"their state takes ([\d,]+) bytes", printed)
    assert 0 < file - int(size.replace(",", "")) < 4096  # Names and shapes.


def test_training_on_a_text_leaves_a_run_that_writes(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("so much depends upon\n" * 500, encoding="utf-8")
    printed = run_example("train_on_your_text.py", tmp_path, "my.txt", "25")
    assert (tmp_path / "runs/my-text/loss.png").stat().st_size > 1000
    [checkpoint] = (tmp_path / "runs/my-text/checkpoints").iterdir()
    assert checkpoint.name == "step-00000025"
    assert printed.startswith("def ")
