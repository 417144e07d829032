import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mambakit import ops
from mambakit.errors import BackendError
from mambakit.ops import cpu, cuda, dispatch, reference, rms_norm
from mambakit.ops.dispatch import explain, resolve_backend, unavailable

CPU = torch.device("cpu")


def test_auto_takes_the_first_that_can() -> None:
    assert resolve_backend("auto", CPU, torch.float32) == "cpu"
    assert resolve_backend("auto", CPU, torch.float64) == "reference"
    assert resolve_backend("auto", torch.device("meta"), torch.float32) == "reference"


def test_a_named_backend_runs_or_says_why_not() -> None:
    assert resolve_backend("reference", CPU, torch.float32) == "reference"
    with pytest.raises(BackendError, match="no compiled kernel for torch.float64; use float32"):
        rms_norm(torch.ones(2, dtype=torch.float64), torch.ones(2), backend="cpu")
    with pytest.raises(BackendError, match="the tensors are on meta"):
        resolve_backend("cpu", torch.device("meta"), torch.float32)
    with pytest.raises(BackendError, match="got 'cud', wanted 'auto' or one of"):
        resolve_backend("cud", CPU, torch.float32)


def test_explain_gives_a_reason_for_each_that_cannot() -> None:
    choices = explain(CPU, torch.float64)
    assert [c.backend for c in choices] == ["cpu", "cuda", "reference"]
    assert "float64" in choices[0].unavailable
    assert choices[1].unavailable is not None
    assert choices[2].unavailable is None


class Gpu(NamedTuple):
    name: str
    major: int
    minor: int


def test_why_cuda_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that claims to have a GPU: each reason in turn, then none."""
    gpu, float32 = torch.device("cuda", 0), torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no NVIDIA GPU" in unavailable("cuda", CPU, float32)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in dispatch._gpu_unavailable(gpu)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "finds no NVIDIA GPU" in dispatch._gpu_unavailable(gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "the tensors are on cpu; move them with .cuda()" in unavailable("cuda", CPU, float32)
    assert "the tensors are on cuda:0" in unavailable("cpu", gpu, float32)
    assert "use complex64" in unavailable("cuda", gpu, torch.complex128)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu("Old", 7, 5))
    assert "Old has compute capability 7.5" in dispatch._gpu_unavailable(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu("New", 9, 0))
    monkeypatch.setattr(dispatch, "_HAS_CUDA_CORE", False)
    assert "pip install cuda-core" in dispatch._gpu_unavailable(gpu)
    monkeypatch.setattr(dispatch, "_HAS_CUDA_CORE", True)
    assert dispatch._gpu_unavailable(gpu) is None


def test_why_the_cpu_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without numba; which is looked for when the module is imported, since torch.compile cannot look into that."""
    monkeypatch.setattr(dispatch, "_HAS_NUMBA", False)
    monkeypatch.setattr("importlib.util.find_spec", None)
    assert "pip install numba" in unavailable("cpu", CPU, torch.float32)
    assert resolve_backend("auto", CPU, torch.float32) == "reference"


def test_every_backend_has_every_op() -> None:
    for folder in (cpu, cuda, reference):
        assert set(ops.__all__) <= set(folder.FILES)


def test_a_second_process_does_not_compile() -> None:
    """The machine code of the first process is loaded from disk."""
    program = (
        "import torch; from mambakit.ops import rms_norm\n"
        "rms_norm(torch.ones(2, 3), torch.ones(3), backend='cpu')\n"
        "from mambakit.ops.cpu.kernels.rms_norm import forward\n"
        "stats = forward.stats\n"
        "print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))"
    )
    run = [sys.executable, "-c", program]
    subprocess.run(run, check=True, capture_output=True)
    second = subprocess.run(run, check=True, capture_output=True, text=True)
    assert second.stdout.split() == ["1", "0"]


def test_the_cache_notices_a_change_in_a_neighbouring_file() -> None:
    """The name of a cached kernel holds a digest of all kernel sources."""
    from mambakit.ops.cpu.kernels import rms_norm as kernels
    from mambakit.ops.cpu.kernels.simd import _digest_of_sources

    rms_norm(torch.ones(2, 3), torch.ones(3), backend="cpu")
    names = [path.name for path in Path(kernels.forward.stats.cache_path).glob("rms_norm.forward*")]
    assert any(_digest_of_sources() in name for name in names)
