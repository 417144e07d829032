"""packages/mamba-ssm-shim, installed into an empty folder, gives programs that know nothing of mambakit their names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHIM = Path(__file__).parents[2] / "packages" / "mamba-ssm-shim"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the shim in it."""
    source, target = tmp_path_factory.mktemp("source") / "shim", tmp_path_factory.mktemp("site")
    shutil.copytree(SHIM, source)  # A build leaves files beside the source.
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*command, "--target", str(target), str(source)], check=True)
    return target


def run(site, script, *arguments):
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *arguments, *(["-c", script] if script else [])],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}, cwd=site,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_it_is_three_small_modules(site):
    assert {path.name for path in site.glob("*.py")} == {
        "mamba_ssm.py", "causal_conv1d.py", "selective_scan_cuda.py",
    }  # fmt: skip


@pytest.mark.parametrize(
    "statement",
    [
        "import mamba_ssm",
        "from mamba_ssm import Mamba",
        "from mamba_ssm.ops.triton.selective_state_update import selective_state_update",
        "import causal_conv1d",
        "from causal_conv1d.cpp_functions import causal_conv1d_fwd_function",
        "import selective_scan_cuda",
    ],
)
def test_any_first_import(site, statement):
    script = f"""
{statement}
import sys, importlib.metadata
import mamba_ssm, causal_conv1d, selective_scan_cuda
import mamba_ssm.models.mixer_seq_simple
import mambakit.compat.mamba_ssm, mambakit.compat.causal_conv1d, mambakit.compat.selective_scan_cuda as scan
assert sys.modules["mamba_ssm"] is mamba_ssm is mambakit.compat.mamba_ssm
assert causal_conv1d is mambakit.compat.causal_conv1d and selective_scan_cuda is scan
print(importlib.metadata.version("mamba_ssm"))
"""
    assert run(site, script) == "2.3.2+mambakit"


def test_a_program(site):
    program = """
import torch
from mamba_ssm import Mamba

torch.manual_seed(0)
mixer = Mamba(d_model=16, d_state=16, d_conv=4, expand=2)
y = mixer(torch.randn(2, 64, 16))
y.sum().backward()
print(tuple(y.shape), all(p.grad is not None for p in mixer.parameters()))
"""
    (site / "program.py").write_text(program, encoding="utf-8")
    for arguments in (["program.py"], ["-m", "program"]):
        assert run(site, "", *arguments) == "(2, 64, 16) True"


def test_install_as_well(site):
    script = "import mambakit.compat as c; c.install(); import mamba_ssm; c.install(); print(mamba_ssm.__name__)"
    assert run(site, script) == "mambakit.compat.mamba_ssm"
