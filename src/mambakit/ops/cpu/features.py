"""What the processor can do."""

from __future__ import annotations

import functools
import platform

import torch

from mambakit.errors import ConfigError

KNOWN = ("avx2", "fma", "avx512f", "avx512bf16", "amx-bf16", "neon", "sve", "bf16")
"""Instruction sets that matter here, by LLVM's names."""
BFLOAT16 = ("avx512bf16", "amx-bf16", "avxneconvert", "bf16")
"""Any of them, and PyTorch multiplies bfloat16 matrices faster than float32 ones."""


@functools.cache
def features() -> frozenset[str]:
    """Names of the instruction sets of this processor, as LLVM knows them."""
    import llvmlite.binding

    return frozenset(
        name for name, is_there in llvmlite.binding.get_host_cpu_features().items() if is_there
    )


def slow_bfloat16() -> str | None:
    """Why products of bfloat16 matrices are no faster than float32 ones here; None if they are, or nobody knows."""
    found = features()
    if not found.isdisjoint(BFLOAT16) or platform.machine() not in ("x86_64", "AMD64"):
        return None
    if "avx512f" in found:
        return (
            "this CPU computes bfloat16 in float32 and converts, having AVX-512 but not AVX512-BF16"
        )
    return (
        "this CPU has no AVX512-BF16 and no AMX, and PyTorch multiplies bfloat16 matrices on it "
        "hundreds of times slower than float32 ones"
    )


def check_bfloat16(device: torch.device) -> None:
    """Raise ConfigError if bfloat16 would make the work on this device hopelessly slow."""
    if device.type == "cpu" and "avx512f" not in features() and (reason := slow_bfloat16()):
        raise ConfigError(f"precision: got bfloat16, but {reason}; use float32")
