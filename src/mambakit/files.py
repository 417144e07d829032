"""Files and folders that appear whole or not at all.

What is written goes to a hidden sibling (`.name.1f3a9c02.partial.ext`) and is renamed when it is
complete and on disk, so that a crash, a kill or a full disk never leaves something that looks
whole. The suffix is kept because `numpy.save`, matplotlib and others look at it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from mambakit.errors import ArgumentError, MambakitError

_LEFTOVER_SECONDS = 24 * 3600
_FULL_BYTES = 1 << 20

_FULL = "the disk is full; free some space or choose a folder on another disk"
_FORBIDDEN = "no permission to write there; choose another folder or change its permissions"
_NOT_A_FOLDER = "a part of this path is a file, not a folder; choose another path"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "the file is larger than this disk or account allows; choose another folder",
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.ENOTDIR: _NOT_A_FOLDER,
    errno.EEXIST: _NOT_A_FOLDER,
    errno.EISDIR: "there is a folder of this name; choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write; on success it becomes `path`, on any error it is removed.

    Missing parent folders are made. The file is flushed to disk before it is renamed.

    Args:
        path: File to write; an existing one is replaced in one step.

    Yields:
        The path that the body must create and write, in the same folder and with the same suffix.

    Raises:
        MambakitError: The disk is full, or there is no permission to write there.
    """
    target = Path(os.path.abspath(path))
    with _partial(target) as partial:
        yield partial
        _flush(partial)
        os.replace(partial, target)
        _flush_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder to fill; on success it becomes `path`, on any error it is removed.

    Args:
        path: Folder to make; an existing one is replaced **with all that it holds**. A kill
            between the two renames of a replacement leaves no folder at `path`, never a mixed one.

    Yields:
        The folder that the body fills.

    Raises:
        MambakitError: The disk is full, or there is no permission to write there.
    """
    target = Path(os.path.abspath(path))
    with _partial(target) as partial:
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        _flush_folder(partial)
        _replace_folder(partial, target)
        _flush_folder(target.parent)


def check_new_folder(path: Path) -> None:
    """Raise ArgumentError unless `path` is free for a new folder: nothing is there, or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArgumentError(f"out: {path} is not an empty folder; name a new one")


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """Give a fresh sibling path of `target`, removed at the end if still there; explain errors."""
    partial = _sibling(target, secrets.token_hex(4))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        yield partial
    except MambakitError:
        raise
    except Exception as error:
        reason = _reason(error, target, partial)
        if reason is None:
            raise
        raise MambakitError(f"{target} cannot be written: {reason}") from error
    finally:
        _remove(partial)


def _sibling(target: Path, tag: str) -> Path:
    return target.with_name(f".{target.stem}.{tag}.partial{target.suffix}")


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers left, if untouched for a day: other writers may be at work."""
    pattern = str(_sibling(Path(glob.escape(str(target))), "*"))
    for leftover in map(Path, glob.glob(pattern)):
        # A living writer may rename or change it while we look: then it is no leftover.
        with contextlib.suppress(OSError):
            newest = max(file.stat().st_mtime for file in (leftover, *leftover.rglob("*")))
            if time.time() - newest > _LEFTOVER_SECONDS:
                _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # A file that cannot be removed must not hide the error that made us remove it.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _replace_folder(partial: Path, target: Path) -> None:
    if not target.is_dir():
        os.replace(partial, target)
        return
    # No system replaces a filled folder in one step: move the old one aside first.
    aside = _sibling(target, secrets.token_hex(4))
    os.replace(target, aside)
    try:
        os.replace(partial, target)
    except OSError:
        os.replace(aside, target)
        raise
    _remove(aside)


def _flush(file: Path) -> None:
    with open(file, "r+b") as handle:  # Windows flushes only a handle that may write.
        os.fsync(handle.fileno())


def _flush_folder(folder: Path) -> None:
    """Put a rename itself on disk; Windows neither offers nor needs it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception, target: Path, partial: Path) -> str | None:
    """Why writing failed and what to do, or None if the error is about something else."""
    if isinstance(error, OSError) and error.errno is not None:
        if error.filename is None:
            return _REMEDIES.get(error.errno)
        ours = _concerns(Path(os.fsdecode(error.filename)), target, partial)
        return _REMEDIES.get(error.errno, error.strerror) if ours else None
    # Libraries in Rust tell the system's number in the text; those in C++ tell nothing, so look.
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(found[1])
        return _REMEDIES.get(OSError(number, "", None, number).errno or 0)  # Windows has its own.
    with contextlib.suppress(OSError):
        if shutil.disk_usage(target.parent).free < _FULL_BYTES:
            return _FULL
    return None


def _concerns(path: Path, target: Path, partial: Path) -> bool:
    return partial in (path, *path.parents) or path in (target, *target.parents)
