"""Compiled kernels on disk, so that a kernel is compiled once on a machine.

A file is a digest of what follows and then the binary: one that was cut short or damaged is noticed and made anew.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from mambakit.errors import MambakitError
from mambakit.files import atomic_write

Binary = bytes
"""Machine code (ELF), or PTX as text."""

_DIGEST_BYTES = hashlib.sha256().digest_size
_warned = False


def cached(key: str, make: Callable[[], Binary]) -> Binary:
    """The binary of this key: read if it is on disk, else made and, if the folder can be written, kept.

    Args:
        key: Names what went into the binary; part of the file name.
        make: Compiles it.
    """
    try:
        path = folder() / f"{key}.bin"
        stored = path.read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        stored = b""
    digest, binary = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if binary and hashlib.sha256(binary).digest() == digest:
        return binary
    binary = make()
    try:
        with atomic_write(folder() / f"{key}.bin") as partial:
            partial.write_bytes(hashlib.sha256(binary).digest() + binary)
    except (OSError, RuntimeError, MambakitError) as error:
        _warn_once(str(error))
    return binary


def folder() -> Path:
    """Where binaries are kept: `$MAMBAKIT_CACHE`, or mambakit in the cache folder of this user."""
    if own := os.environ.get("MAMBAKIT_CACHE"):
        return Path(own) / "cuda"
    user = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(user) if user else Path.home() / ".cache") / "mambakit" / "cuda"


def _warn_once(reason: str) -> None:
    """One reason for all kernels: it differs only in the file that could not be written."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"compiled CUDA kernels are not kept, every process compiles them anew: {reason} "
            "(or set MAMBAKIT_CACHE to a folder)",
            stacklevel=3,
        )
