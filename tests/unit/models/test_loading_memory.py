"""How much memory a checkpoint takes while it is loaded: the peak of a process that does nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mambakit.models import MambaConfig, MambaLanguageModel, save_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
]

PROGRAM = """
import re, sys, torch
from mambakit.models import MambaConfig, MambaLanguageModel, load_model, save_model, weights

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

folder, format, dtype = sys.argv[1:]
weights.MAPPED_BYTES = 2**24  # as small a part of this model as the real value is of a large one
save_model(MambaLanguageModel(MambaConfig(d_model=8, n_layer=1)), folder + "/small", format)
load_model(folder + "/small", dtype=torch.float64)  # imports, and what first calls take
before = peak()
model = load_model(folder, dtype=getattr(torch, dtype))
print(peak() - before, sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.fixture(scope="module", params=["mambakit", "official"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """425 MB of float32."""
    folder = tmp_path_factory.mktemp("large") / request.param
    model = MambaLanguageModel(MambaConfig(d_model=1024, n_layer=16, vocab_size=1024))
    save_model(model, folder, request.param)
    return folder


@pytest.mark.parametrize(("dtype", "megabytes"), [("float32", 430), ("bfloat16", 218)])
def test_peak_memory(checkpoint: Path, dtype: str, megabytes: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(checkpoint), checkpoint.name, dtype],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    taken, size = map(int, result.stdout.split())
    assert size == pytest.approx(megabytes * 1e6, rel=0.02)
    assert 0.9 * size < taken < 1.2 * size
