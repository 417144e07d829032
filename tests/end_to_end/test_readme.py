"""Every `python` block of the README and of the documentation runs as it stands.

The blocks of a page run in order, as one program, in an empty folder, with warnings as errors.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[str]:
    return _PYTHON.findall(page.read_text(encoding="utf-8"))


PAGES = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if blocks(p)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "\n".join(blocks(page))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out.splitlines()
    for expected in expected_lines(code):
        assert expected in printed


def expected_lines(code: str) -> list[str]:
    """What a page says that its code prints: the comment after a `print`."""
    return re.findall(r"^ *print\(.*\)  # (.+)$", code, re.MULTILINE)


def test_readme_has_a_quick_start_of_ten_lines() -> None:
    (quick_start,) = blocks(ROOT / "README.md")
    code = [line for line in quick_start.splitlines() if not line.startswith(("import", "from"))]
    assert len([line for line in code if line]) <= 10
