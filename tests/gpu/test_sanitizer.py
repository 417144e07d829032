"""compute-sanitizer finds no access out of bounds and no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from examples import OPS, STEPS, skip_or_fail

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
SCRIPT = Path(__file__).with_name("small_shapes.py")
FOLDERS = (Path("/usr/local/cuda/bin"), Path("/usr/local/cuda/compute-sanitizer"))


@pytest.fixture(scope="module")
def sanitizer() -> str:
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, FOLDERS)])
    found = shutil.which("compute-sanitizer", path=path)
    if found is None:
        skip_or_fail("compute-sanitizer is not installed")
    return found


@pytest.mark.parametrize("name", [*OPS, *STEPS, "causal_conv1d_linear", "model_step"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_clean(sanitizer: str, tool: str, name: str) -> None:
    # Libraries ask the driver for functions that it may not have; what they are told is no error of ours.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *options]
    command += [sys.executable, SCRIPT, name]
    # Without PyTorch's pool every tensor is an allocation of its own, with bounds that are checked.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    output = result.stdout + result.stderr
    if "Device not supported" in output:
        skip_or_fail("compute-sanitizer cannot attach to this GPU")
    assert result.returncode == 0, output[-5000:]
    assert "ERROR SUMMARY: 0 errors" in output or "RACECHECK SUMMARY: 0 hazards" in output
