"""The authors' own test files, run on our functions: unchanged on a GPU, with another device on a CPU.

They are not in this repository. `MAMBAKIT_OFFICIAL_TESTS` names folders that hold them: checkouts of
state-spaces/mamba and Dao-AILab/causal-conv1d, separated like the folders of PATH.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDERS = [Path(p) for p in os.environ.get("MAMBAKIT_OFFICIAL_TESTS", "").split(os.pathsep) if p]
FILES = (
    "tests/ops/test_selective_scan.py",
    "tests/ops/triton/test_selective_state_update.py",
    "tests/test_causal_conv1d.py",
)
TOO_LARGE = {"cpu": "not 4128 and not 4096 and not race_condition", "cuda": ""}
"""Of the convolution's thousands of cases those that take hours on a CPU."""
INSTALL = "import mambakit.compat\n\nmambakit.compat.install()\n"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("file", FILES)
def test_official_suite(file, device, tmp_path, record_property):
    if not FOLDERS:
        pytest.skip(
            "MAMBAKIT_OFFICIAL_TESTS is not set; name in it folders of state-spaces/mamba and "
            "Dao-AILab/causal-conv1d"
        )
    pytest.importorskip("einops", reason="the authors' tests need einops; pip install einops")
    found = [folder / file for folder in FOLDERS if (folder / file).is_file()]
    if not found:
        pytest.skip(f"no {file} in MAMBAKIT_OFFICIAL_TESTS; add the checkout that has it")
    text = found[0].read_text(encoding="utf-8")
    if device == "cpu":
        text, count = re.subn(r"""device = (["'])cuda\1""", 'device = "cpu"', text)
        assert count > 0
    (tmp_path / "conftest.py").write_text(INSTALL, encoding="utf-8")
    (tmp_path / "test_official.py").write_text(text, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    ]
    only = ["-k", TOO_LARGE[device]] if "conv1d" in file and TOO_LARGE[device] else []
    result = subprocess.run(
        [*command, *only, "test_official.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed
    record_property("passed", int(passed[1]))
