"""From the name of a CUDA source file to a kernel that can be launched.

    kernel("rms_norm.cu", "forward", device, IO="bfloat16", WIDTH=4)(grid, block, x, y, rows, eps)

The constants are macros of the source, so one file holds all variants of a kernel. NVRTC needs no GPU: `compile_source`
is a pure function, with which the tests compile every kernel for every architecture.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import json
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mambakit.errors import BackendError
from mambakit.ops.cuda import binaries
from mambakit.ops.cuda.launch import Kernel, loaded

KERNELS = Path(__file__).parent / "kernels"
OLDEST = 80
"""Compute capability 8.0 (Ampere), the first with bfloat16 and asynchronous copies."""
WITH_WARPGROUPS = 90
"""Compute capability 9.0 (Hopper), of whose own instructions (sm_90a) some kernels make use."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, as ptxas reports it."""

    registers: int
    """Per thread."""
    stack: int
    """Bytes of local memory per thread that are no spills: arrays that are indexed at run time."""
    spill_stores: int
    """Bytes per thread written to local memory for want of registers."""
    spill_loads: int
    """Bytes per thread read back."""
    shared: int
    """Bytes of static shared memory per block."""


@dataclass(frozen=True)
class Log:
    """What the compiler said."""

    text: str
    resources: dict[str, Resources]
    """Of each kernel in the file, by name."""


_lock = threading.Lock()


def kernel(file: str, name: str, device: torch.device, **constants: int | str) -> Kernel:
    """Give a kernel of `kernels/<file>` for a device, compiled unless it was before.

    Args:
        file: Name of a source file in `kernels`.
        name: Name of an `extern "C"` function in it.
        device: The CUDA device that it will run on; without an index, the current one.
        constants: Macros of the source: numbers, or types such as "bfloat16".

    Raises:
        BackendError: cuda-core, NVRTC or the driver is missing or too old, or the GPU is.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    return _kernel(file, name, index, tuple(constants.items()))


@functools.cache
def _kernel(
    file: str, name: str, index: int, constants: tuple[tuple[str, int | str], ...]
) -> Kernel:
    # The kernels of one file and its constants are one binary; threads that meet here compile it once.
    with _lock:
        binary = _binary(file, index, tuple(sorted(constants)))
        return loaded(binary, name, index)


@functools.cache
def _binary(file: str, index: int, constants: tuple[tuple[str, int | str], ...]) -> binaries.Binary:
    named = dict(constants)
    arch = target(torch.cuda.get_device_capability(index), supported())
    identity = json.dumps([file, constants, arch, _options(), nvrtc_version(), sources(KERNELS)])
    key = f"{Path(file).stem}-{arch}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
    return binaries.cached(key, lambda: compile_source(file, named, arch)[0])


def compile_source(file: str, constants: dict[str, int | str], arch: str) -> tuple[bytes, Log]:
    """Compile one source file; needs NVRTC, but no GPU.

    Args:
        file: Name of a source file in `kernels`.
        constants: Its macros.
        arch: "sm_90a" for machine code of that architecture, "compute_90" for PTX, which the driver finishes.

    Returns:
        The binary, and what the compiler said (of PTX: no resources).

    Raises:
        BackendError: cuda-core or NVRTC is missing, or the source does not compile.
    """
    core = import_core()
    code = (KERNELS / file).read_text(encoding="utf-8")
    macros = [(name, str(value)) for name, value in constants.items()]
    machine = arch.startswith("sm_")
    log = io.StringIO()
    options = core.ProgramOptions(
        name=file,
        arch=arch,
        define_macro=macros or None,
        include_path=str(KERNELS),
        ptxas_options=["-v"] if machine else None,
        **_options(),
    )
    try:
        program = core.Program(code, "c++", options)
        binary = bytes(program.compile("cubin" if machine else "ptx", logs=log).code)
    except Exception as error:
        raise BackendError(f"{file} cannot be compiled for {arch}: {error}") from error
    return binary, Log(log.getvalue(), _resources(log.getvalue()))


def target(capability: tuple[int, int], known: tuple[int, ...]) -> str:
    """What to compile for: the machine itself, or PTX of the newest architecture that NVRTC knows.

    Args:
        capability: Compute capability of the device, (major, minor).
        known: Architectures of this NVRTC: 90 for sm_90.

    Raises:
        BackendError: The GPU is older than the kernels, or than this NVRTC.
    """
    number = 10 * capability[0] + capability[1]
    if number < OLDEST:
        raise BackendError(
            f"the GPU is sm_{number}, and the kernels need sm_{OLDEST} or newer; use backend='reference'"
        )
    if number in known:
        return f"sm_{number}{'a' if number == WITH_WARPGROUPS else ''}"
    older = [arch for arch in known if arch < number]
    if not older:
        raise BackendError(f"NVRTC knows no architecture as old as sm_{number}; {_remedy()}")
    return f"compute_{max(older)}"


@functools.cache
def sources(folder: Path) -> str:
    """A digest of all kernel sources: a file includes others, so a change in any makes all anew."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".cu", ".cuh"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of the NVRTC of this process."""
    major, minor = _ask_nvrtc("nvrtcVersion")
    return int(major), int(minor)


@functools.cache
def supported() -> tuple[int, ...]:
    """The architectures that this NVRTC knows."""
    return tuple(int(arch) for arch in _ask_nvrtc("nvrtcGetSupportedArchs")[0])


def _ask_nvrtc(question: str) -> list[Any]:
    import_core()
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    try:
        status, *answer = getattr(nvrtc, question)()
    except Exception as error:  # pathfinder names it differently from version to version
        raise BackendError(f"NVRTC, the CUDA compiler, cannot be loaded; {_remedy()}") from error
    assert int(status) == 0, f"{question}: {status}"
    return list(answer)


@functools.cache
def import_core() -> Any:
    """The package cuda.core.

    Raises:
        BackendError: It, or cuda.bindings which it stands on, is missing.
    """
    try:
        return importlib.import_module("cuda.core")
    except ImportError as error:
        raise BackendError(f"cuda-core cannot be imported ({error}); {_remedy()}") from error


def _remedy() -> str:
    major = (torch.version.cuda or "13").split(".")[0]
    return f"pip install 'cuda-core[cu{major}]'"


def _options() -> dict[str, Any]:
    # What some constants make of a source is no mistake. 128: a loop that never runs; 177: a constant not used.
    return {"std": "c++17", "diag_suppress": [128, 177]}


_FUNCTION = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def _resources(log: str) -> dict[str, Resources]:
    """Read the report of `ptxas -v`: for each kernel its name, then a line on the stack, then one on the rest."""
    found: dict[str, Resources] = {}
    name, stack = "", (0, 0, 0)
    for line in log.splitlines():
        if match := _FUNCTION.search(line):
            name = match[1]
        elif match := _STACK.search(line):
            frame, stores, loads = map(int, match.groups())
            stack = frame, stores, loads
        elif match := _USED.search(line):
            frame, stores, loads = stack
            found[name] = Resources(
                int(match[1]), max(frame - stores, 0), stores, loads, int(match[2] or 0)
            )
    return found
