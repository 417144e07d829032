from __future__ import annotations

import importlib.metadata

import pytest
import torch

from mambakit.cli import doctor
from mambakit.cli.main import main
from mambakit.ops.dispatch import Choice


def test_it_shows_versions_hardware_and_caches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for wanted in (
        f"torch {importlib.metadata.version('torch')}",
        f"{torch.get_num_threads()} of ",
        "GiB",
        "kernel cache",
        "writable",
    ):
        assert wanted in out


def test_it_says_what_auto_picks_and_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explain(device: torch.device, dtype: torch.dtype) -> list[Choice]:
        reason = None if dtype == torch.float32 else "too odd a dtype"
        return [Choice("fast", reason), Choice("plain", None)]

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("mambakit.ops.dispatch.explain", explain)
    assert main(["doctor"]) == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["cpu", "float32", "fast", "plain:", "slower"] in rows
    assert ["cpu", "float64", "plain", "fast:", "too", "odd", "a", "dtype"] in rows


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    (line,) = [value for name, value in doctor._software() if name == "packages"]
    assert line.endswith("no-such-package is missing")
