"""lm-evaluation-harness through our command, and our model through its command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval; pip install 'mambakit[eval]'")


def run(*args: object) -> str:
    command = [sys.executable, "-m", *map(str, args)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_both_commands_give_the_same_numbers(
    trained: Path, task_folder: Path, tmp_path: Path
) -> None:
    names = "squares_answer,squares_choice,squares_text,squares_written"
    ours = run(
        "mambakit", "evaluate", "--checkpoint", trained, "--device", "cpu", "--tasks", names,
        "--include-path", task_folder, "--output", tmp_path / "ours.json",
    )  # fmt: skip
    theirs = run(
        "mambakit.lm_eval", "--model", "mambakit", "--model_args", f"pretrained={trained}",
        "--device", "cpu", "--batch_size", 1, "--tasks", names, "--include_path", task_folder,
        "--output_path", tmp_path / "theirs.json",
    )  # fmt: skip
    (file,) = tmp_path.glob("theirs*.json")
    one, other = (
        json.loads(path.read_text(encoding="utf-8"))["results"]
        for path in (tmp_path / "ours.json", file)
    )
    for task in names.split(","):
        metrics = {name: value for name, value in one[task].items() if "stderr" not in name}
        assert metrics == {name: other[task][name] for name in metrics}
        assert task in ours
        assert task in theirs
    # Thirty steps of training are enough to know the text better than by chance: 8 bits a byte.
    assert one["squares_text"]["bits_per_byte,none"] < 6
