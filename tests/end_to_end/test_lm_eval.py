"""lm-evaluation-harness through our command, and our model through its command."""

from __future__ import annotations

import json
import shutil
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


PLUGIN = Path(__file__).parents[2] / "packages" / "lm-eval-mambakit"
TYPED = """
import site, sys
site.addsitedir(sys.argv.pop(1))  # as Python's start does with the folder that pip installs into
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""
"""The command `lm_eval`."""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packages/lm-eval-mambakit installed in it."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(PLUGIN, source)  # A build leaves files beside the source.
    run(
        "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
        "--target", target, source,
    )  # fmt: skip
    return target


def test_the_plugin_is_a_module_and_its_start(plugin: Path) -> None:
    installed = {path.name for path in plugin.glob("*.p*")}
    assert installed == {"lm_eval_mambakit.py", "lm_eval_mambakit.pth"}
    script = (
        "import sys, lm_eval_mambakit; print('lm_eval' in sys.modules, 'mambakit' in sys.modules)"
    )
    command = [sys.executable, "-S", "-c", script]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=plugin, check=True)
    assert result.stdout.strip() == "False False"


@pytest.mark.slow
def test_their_command_as_it_is_typed(plugin: Path, trained: Path, task_folder: Path) -> None:
    command = [
        sys.executable, "-c", TYPED, plugin, "--model", "mambakit",
        "--model_args", f"pretrained={trained}", "--device", "cpu", "--tasks", "squares_answer",
        "--include_path", task_folder,
    ]  # fmt: skip
    result = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert "squares_answer" in result.stdout
