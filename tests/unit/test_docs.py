"""The documentation builds without a warning, and what it says about names and versions is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import mambakit
from mambakit.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    scan = (tmp_path / "reference" / "ops" / "index.html").read_text(encoding="utf-8")
    assert "Document number of each position" in scan  # From the docstring of selective_scan.


def test_changelog_has_the_version_of_the_package() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert versions[0] == mambakit.__version__


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_lead_to_files(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def commands_in_pages() -> dict[str, set[str]]:
    """Options of every `mambakit COMMAND` in shell blocks and inline code, by command."""
    options: dict[str, set[str]] = defaultdict(set)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = [body for language, body in _FENCE.findall(text) if language == "sh"]
        inline = re.findall(r"`(mambakit [^`]+)`", _FENCE.sub("", text))
        for line in "\n".join([*blocks, *inline]).replace("\\\n", " ").splitlines():
            called = re.match(r"(?:\S+=\S+ )*mambakit (\w+)(.*)", line.strip())
            if called:
                name, rest = called.groups()
                options[name].update(re.findall(r"--[\w.-]+", rest.partition(" #")[0]))
    return options


@pytest.mark.parametrize(("name", "options"), sorted(commands_in_pages().items()))
def test_commands_and_options_exist(
    name: str, options: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in COMMANDS
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    known = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    assert options <= known | {"--help", "--debug"}
