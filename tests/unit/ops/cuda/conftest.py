from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mambakit.errors import BackendError
from mambakit.ops.cuda import compiler

sys.path.insert(0, str(Path(__file__).parent))  # zero_layers.py beside this file


def has_nvrtc() -> bool:
    try:
        return bool(compiler.supported())
    except (BackendError, ImportError):  # What a missing package gives; all else is our fault.
        return False


@pytest.fixture(scope="session")
def nvrtc() -> None:
    """NVRTC, which needs no GPU; the dev extra brings it where there are packages of it."""
    if not has_nvrtc():
        if "nvrtc" in os.environ.get("MAMBAKIT_REQUIRE", "").split(","):
            pytest.fail("MAMBAKIT_REQUIRE=nvrtc, but there is none")
        pytest.skip("needs the packages cuda-core, cuda-bindings and nvidia-cuda-nvrtc")


def clear_memory() -> None:
    for memory in (compiler._kernel, compiler._binary, compiler.sources):
        memory.cache_clear()


@pytest.fixture
def write_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Writes sources into a folder of kernels of its own; the cache on disk is a new one too."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    monkeypatch.setattr(compiler, "KERNELS", folder)
    monkeypatch.setenv("MAMBAKIT_CACHE", str(tmp_path / "cache"))

    def write(code: str, file: str = "a.cu") -> None:
        (folder / file).write_text(code, encoding="utf-8")
        clear_memory()  # As a new process would look at the sources.

    clear_memory()
    yield write
    clear_memory()
