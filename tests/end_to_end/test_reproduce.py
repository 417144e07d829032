"""The small forms of the paper's experiments: selection is what makes the difference, by a stated margin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mambakit.cli.main import main

pytestmark = pytest.mark.slow

MARGIN = 20.0
"""Percentage points by which the selective model is better, at the least; measured: 33 and 78."""


@pytest.mark.parametrize(
    ("experiment", "selective", "constant", "seqlen"),
    [
        ("selective-copying", "mamba-s6", "mamba-s4d-real", "64"),
        ("induction-heads", "mamba", "mamba-s4d-real", "256"),
    ],
)
def test_the_selective_model_wins(experiment, selective, constant, seqlen, tmp_path: Path, capsys):
    command = ["reproduce", experiment, "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 0
    assert "accuracy in percent" in capsys.readouterr().out
    models = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["models"]
    accuracy = {n: m["test"][seqlen]["accuracy_percent"] for n, m in models.items()}
    assert accuracy[selective] > 80
    assert accuracy[selective] - accuracy[constant] > MARGIN
