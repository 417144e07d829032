from __future__ import annotations

import json
from pathlib import Path

import pytest

from mambakit.cli.main import main
from mambakit.reproduce import Experiment, catalogue


@pytest.fixture
def tiny_by_name(tiny: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue.EXPERIMENTS, "tiny", tiny)


def run(*args: object) -> int:
    return main(["reproduce", *map(str, args)])


def test_list(capsys):
    assert run("--list") == 0
    out = capsys.readouterr().out
    assert "selective-copying: Selective copying" in out
    assert "induction-heads: Induction heads" in out
    assert "mamba, attention-absolute, attention-rope, attention-xpos" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "experiment: got none; mambakit reproduce --list shows what there is"),
        (["selective-coping"], "did you mean 'selective-copying'?"),
        (["induction-heads", "--models", "lstm"], "models: got 'lstm', but induction-heads has: mamba,"),
        (["induction-heads", "--quick", "--models", "attention-rope"], "has: mamba, mamba-s4d-real"),
        (["induction-heads", "--max-minutes", "0"], "--max-minutes: got 0, wanted more than 0"),
        (["induction-heads", "--max-minutes", "nan"], "--max-minutes: got nan, wanted more than 0"),
        (["induction-heads", "--device", "tpu"], "tpu"),
        (["induction-heads", "--draw"], "has no checkpoint of induction-heads to draw; train first"),
        (["induction-heads", "--quik"], "--quik"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_told_in_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tiny_by_name")
def test_a_run_ends_with_the_table_and_files(tmp_path: Path, capsys):
    assert run("tiny", "--out", tmp_path, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert "Mamba: paper" in out
    assert "99.8" in out
    assert f"done; {tmp_path / 'results.json'} has it all" in out
    assert "mamba: step 4 of 24" in err
    assert len(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["models"]) == 3
    assert run("tiny", "--out", tmp_path, "--draw") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'mamba/dt.png'}\n"


@pytest.mark.usefixtures("tiny_by_name")
def test_max_minutes_stops_and_the_same_command_goes_on(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ("tiny", "--quick", "--models", "constant", "--device", "cpu")
    assert run(*command, "--max-minutes", 1e-4) == 0
    folder = Path("runs/tiny-quick")
    assert f"saved in {folder}; the same command goes on" in capsys.readouterr().out
    assert run(*command) == 0
    assert f"done; {folder / 'results.json'}" in capsys.readouterr().out
    result = json.loads((folder / "constant/result.json").read_text(encoding="utf-8"))
    assert result["step"] == 24
