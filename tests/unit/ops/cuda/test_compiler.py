"""From sources to binaries: architectures, the report of resources, the cache, and what may be missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mambakit.errors import BackendError
from mambakit.ops.cuda import compiler
from mambakit.ops.cuda.compiler import Resources

Write = Callable[..., None]
KERNEL = 'extern "C" __global__ void add(float* x) { x[threadIdx.x] += AMOUNT; }'


def test_target_is_the_machine_or_ptx_of_the_newest_before_it() -> None:
    known = (75, 80, 90, 100, 120)
    assert compiler.target((9, 0), known) == "sm_90a"
    assert compiler.target((12, 0), known) == "sm_120"
    assert compiler.target((13, 5), known) == "compute_120"
    assert compiler.target((8, 9), known) == "compute_80"


def test_target_of_an_old_machine_or_a_new_compiler() -> None:
    with pytest.raises(BackendError, match="sm_75, and the kernels need sm_80 or newer"):
        compiler.target((7, 5), (75, 80, 90))
    with pytest.raises(BackendError, match="knows no architecture as old as sm_80; pip install"):
        compiler.target((8, 0), (90, 100))


def test_resources_of_each_kernel_in_the_report() -> None:
    log = """ptxas info    : 8 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
ptxas         .     72 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 72 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 368 bytes cmem[0]
"""
    assert compiler._resources(log) == {
        "first": Resources(40, 64, 8, 12, 4096),
        "second": Resources(10, 0, 0, 0, 0),
    }


def test_resources_as_this_compiler_reports_them(write_kernel: Write, nvrtc: None) -> None:
    write_kernel(
        'extern "C" __global__ void swap(float* x) { __shared__ float s[64]; s[threadIdx.x] = x[threadIdx.x];'
        "__syncthreads(); x[threadIdx.x] = s[63 - threadIdx.x]; }"
    )
    _, log = compiler.compile_source("a.cu", {}, "sm_90")
    assert log.resources["swap"].shared == 256
    assert 0 < log.resources["swap"].registers < 64


def test_a_source_that_does_not_compile_is_named(write_kernel: Write, nvrtc: None) -> None:
    write_kernel(KERNEL)
    with pytest.raises(BackendError, match=r"(?s)a\.cu cannot be compiled for sm_90: .*AMOUNT"):
        compiler.compile_source("a.cu", {}, "sm_90")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int | str]]:
    """The constants of what is compiled on a machine that claims to be an sm_90, in order."""
    found: list[dict[str, int | str]] = []
    compile_source = compiler.compile_source

    def watched(file: str, constants: dict[str, int | str], arch: str) -> object:
        found.append(constants)
        return compile_source(file, constants, arch)

    monkeypatch.setattr(compiler, "compile_source", watched)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return found


def binary(**constants: int | str) -> bytes:
    """As a new process gets it."""
    return compiler._binary.__wrapped__("a.cu", 0, tuple(constants.items()))


def test_a_kernel_is_compiled_once_on_a_machine(
    write_kernel: Write, compiled: list[dict[str, int | str]], nvrtc: None
) -> None:
    write_kernel(KERNEL)
    assert binary(AMOUNT=1) == binary(AMOUNT=1)
    assert binary(AMOUNT=2) != binary(AMOUNT=1)
    assert compiled == [{"AMOUNT": 1}, {"AMOUNT": 2}]


def test_a_change_in_any_source_compiles_anew(
    write_kernel: Write, compiled: list[dict[str, int | str]], nvrtc: None
) -> None:
    write_kernel(KERNEL)
    before = binary(AMOUNT=1)
    write_kernel("// included by some", "b.cuh")
    assert binary(AMOUNT=1) == before
    write_kernel(KERNEL.replace("+=", "-="))
    assert binary(AMOUNT=1) != before
    assert len(compiled) == 3


def test_another_compiler_or_machine_compiles_anew(
    write_kernel: Write,
    compiled: list[dict[str, int | str]],
    monkeypatch: pytest.MonkeyPatch,
    nvrtc: None,
) -> None:
    write_kernel(KERNEL)
    binary(AMOUNT=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    binary(AMOUNT=1)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 0))
    binary(AMOUNT=1)
    assert len(compiled) == 3


def test_without_cuda_core(write_kernel: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write_kernel(KERNEL)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    compiler.import_core.cache_clear()
    with pytest.raises(BackendError, match=r"cuda-core cannot be imported .* pip install"):
        compiler.compile_source("a.cu", {"AMOUNT": 1}, "sm_90")


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def nvrtcVersion(self) -> None:
            raise RuntimeError("libnvrtc.so: cannot open shared object file")

    monkeypatch.setattr(compiler, "import_core", lambda: None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", Broken())  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="NVRTC, the CUDA compiler, cannot be loaded; pip"):
        compiler.nvrtc_version.__wrapped__()


def test_the_package_contains_the_sources() -> None:
    assert (Path(compiler.__file__).parent / "kernels" / "numbers.cuh").exists()
