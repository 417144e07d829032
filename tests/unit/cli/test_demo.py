from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from mambakit.cli import demo
from mambakit.cli.main import main
from mambakit.errors import DataError
from mambakit.models.config import MambaConfig
from mambakit.train import planning
from mambakit.train.config import TrainConfig, read_toml
from mambakit.train.metrics import read_log


def test_the_standard_library_without_tests_and_other_peoples_code() -> None:
    files = demo.standard_library()
    names = {file.name for file in files}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert len(files) > 200
    root = Path(sysconfig.get_paths()["stdlib"])
    folders = {part for file in files for part in file.relative_to(root).parts[:-1]}
    assert not folders & {"site-packages", "test", "tests"}
    assert all(file.stat().st_size for file in files)


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="no source files; try mambakit prepare"):
        demo.standard_library()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A demo of a second, on two files."""

    def draft(data: Path, out: Path) -> TrainConfig:
        model = MambaConfig(d_model=8, n_layer=1, vocab_size=257)
        return TrainConfig(
            data=data, out=out, model=model, seqlen=32, batch_size=2, valid_tokens=64
        )

    files = demo.standard_library()[:2]
    monkeypatch.setattr(demo, "standard_library", lambda: files)
    monkeypatch.setattr(demo, "draft_config", draft)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 5)
    return tmp_path / "demo"


def test_it_trains_writes_and_says_what_is_there(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "seconds_per_step", lambda config: 0.5)
    assert main(["demo", "--out", str(tiny), "--minutes", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "\nclass " in out
    config = TrainConfig.from_dict(read_toml(tiny / "config.toml"))
    assert config.steps == 10  # 0.9 of 6 seconds in steps of 0.5.
    for name in ("config.toml", "log.jsonl", "loss.png", "tensorboard", "checkpoints"):
        assert str(tiny / name) in out
        assert (tiny / name).exists()
    assert f"mambakit generate --checkpoint {tiny}" in out


def test_again_it_goes_on_with_the_same_plan(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "seconds_per_step", lambda config: 0.5)
    assert main(["demo", "--out", str(tiny), "--minutes", "0.1"]) == 0
    log = read_log(tiny / "log.jsonl")
    monkeypatch.setattr(demo, "_plan", None)
    assert main(["demo", "--out", str(tiny), "--minutes", "9"]) == 0
    assert read_log(tiny / "log.jsonl") == log


def test_a_run_of_something_else_is_not_gone_on_with(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "seconds_per_step", lambda config: 0.5)
    assert main(["demo", "--out", str(tiny), "--minutes", "0.1"]) == 0
    moved = tiny.rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["demo", "--out", str(moved)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: out: {moved} holds a run on {tiny / 'tokens'}; name a new folder\n"


def test_a_step_is_measured_by_taking_some(tiny: Path) -> None:
    data = demo._prepare(tiny)
    assert 0 < planning.seconds_per_step(demo.draft_config(data, tiny)) < 10
    assert [path.name for path in tiny.iterdir()] == ["tokens"]


def test_indentation_is_learned_as_tabs(tmp_path: Path) -> None:
    source = tmp_path / "latin.py"
    source.write_bytes(b"def f():\n        return '\xe9'  # two\n")
    (copy,) = demo._with_tabs([source], tmp_path)
    assert copy.read_text(encoding="utf-8") == "def f():\n\t\treturn '\ufffd'  # two\n"
