from __future__ import annotations

from pathlib import Path

import pytest

from mambakit.cli.main import main


def test_a_document_that_is_cut_for_validation_is_not_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("x" * 99, encoding="utf-8")
    assert main(["prepare", str(source), "--out", str(out), "--valid-fraction", "0.1"]) == 0
    [said, _] = capsys.readouterr().out.splitlines()
    assert said == (
        f"90 train tokens (documents: 1), 10 valid tokens (documents: 1), vocabulary 257, in {out}"
    )
