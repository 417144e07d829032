"""Every CUDA kernel compiles for every architecture, and its numbers fit into registers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from mambakit.ops import cuda
from mambakit.ops.cuda import compiler

MAIN, OTHERS = "sm_90a", ("sm_80", "sm_100", "sm_120")
"""All variants are compiled for one; for each other one a third of them, and every kernel at least once."""

BEFORE_CLUSTERS = "sm_80"
"""There kernels with clusters are neither compiled nor used; those with warpgroups are for the main one alone."""

SPILLED_BYTES = 64
"""A thread may store so much for want of registers: some values that it needs at its beginning and end only."""

SPILLED_BY = {"scan_backward": 160}
"""Kernels that pay for more warps with some more: loads from the first-level cache, beside hundreds of instructions."""

SPILLED_BY_MANY_STATES = 1024
"""More than 128 states: rare, and run with what fits."""

Variant = tuple[str, str, dict[str, Any]]


def variants() -> list[Variant]:
    files = sorted(set(cuda.FILES.values()))
    modules = [importlib.import_module(f"mambakit.ops.cuda.{file}") for file in files]
    return [variant for module in modules for variant in module.variants()]


def cases() -> Iterator[Any]:
    by_kernel: dict[str, list[Variant]] = {}
    for variant in variants():
        by_kernel.setdefault(variant[1], []).append(variant)
    for kernel, found in by_kernel.items():
        for turn in range(max(len(found), len(OTHERS))):
            variant = found[turn % len(found)]
            if turn < len(found):
                yield pytest.param(variant, MAIN, id=f"{kernel}-{turn}-{MAIN}")
            arch = OTHERS[turn % len(OTHERS)]
            if "CLUSTER" in variant[2] and arch == BEFORE_CLUSTERS:
                continue
            if "WARPGROUPS" in variant[2]:
                continue
            yield pytest.param(variant, arch, id=f"{kernel}-{turn % len(found)}-{arch}")


@pytest.mark.parametrize(("variant", "arch"), list(cases()))
def test_compiles_without_spills(variant: Variant, arch: str, nvrtc: None) -> None:
    file, kernel, constants = variant
    binary, log = compiler.compile_source(file, constants, arch)
    assert binary[:4] == b"\x7fELF"
    used = log.resources[kernel]
    many = constants.get("STATES", 0) >= 8
    allowed = SPILLED_BY_MANY_STATES if many else SPILLED_BY.get(kernel, SPILLED_BYTES)
    assert used.spill_stores <= allowed, used
    assert "warning" not in log.text.lower(), log.text


def test_every_source_is_compiled() -> None:
    files = {path.name for path in compiler.KERNELS.glob("*.cu")}
    assert {file for file, _, _ in variants()} == files
