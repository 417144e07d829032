from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mambakit import files
from mambakit.errors import MambakitError
from mambakit.files import atomic_folder, atomic_write


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "new" / "log.json"
    for text in ("first", "second"):
        with atomic_write(target) as partial:
            assert partial.parent == target.parent
            assert partial.suffix == ".json"
            partial.write_text(text, encoding="utf-8")
    assert target.read_text(encoding="utf-8") == "second"
    assert os.listdir(target.parent) == ["log.json"]


@pytest.mark.parametrize("failure", [ValueError("bug"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file_and_the_error(
    tmp_path: Path, failure: BaseException
) -> None:
    target = tmp_path / "log.json"
    target.write_text("old", encoding="utf-8")

    def write_half() -> None:
        with atomic_write(target) as partial:
            partial.write_text("half", encoding="utf-8")
            raise failure

    with pytest.raises(type(failure)):
        write_half()
    assert target.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["log.json"]


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "old").write_bytes(b"1")
    with atomic_folder(target) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "new").write_bytes(b"2")
    assert [p.relative_to(target).as_posix() for p in sorted(target.rglob("*"))] == [
        "inner",
        "inner/new",
    ]
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "old").write_bytes(b"1")

    def write_half() -> None:
        with atomic_folder(target) as partial:
            (partial / "half").write_bytes(b"2")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.skipif(os.name == "nt", reason="Windows does not rename the working folder")
def test_the_working_folder_can_be_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with atomic_folder(".") as partial:
        (partial / "new").write_bytes(b"1")
    assert os.listdir(tmp_path / "here") == ["new"]


def test_a_kill_leaves_no_folder_that_looks_whole(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from mambakit.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as partial:\n"
        "    (partial / 'half').write_bytes(b'2')\n"
        "    os._exit(9)\n"
    )
    target = tmp_path / "run"
    assert subprocess.run([sys.executable, "-c", script, str(target)]).returncode == 9
    assert not target.exists()
    leftover, *others = tmp_path.iterdir()
    assert not others

    # Another writer may still be at work on it: only an old leftover is removed.
    with atomic_folder(target):
        pass
    assert leftover.exists()
    for path in (leftover, leftover / "half"):
        os.utime(path, (0, 0))
    with atomic_folder(target):
        pass
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full; free some space"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
    ],
)
def test_system_errors_name_the_path_and_the_remedy(
    tmp_path: Path, number: int, words: str
) -> None:
    target = tmp_path / "model.safetensors"
    with pytest.raises(MambakitError, match=words) as caught, atomic_write(target) as partial:
        raise OSError(number, os.strerror(number), str(partial))
    assert str(target) in str(caught.value)


def test_a_full_disk_is_recognised_behind_a_foreign_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 4096

    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(MambakitError, match="disk is full"), atomic_write(tmp_path / "a"):
        raise RuntimeError("file write failed")


def test_the_number_in_an_error_of_a_rust_library_is_read(tmp_path: Path) -> None:
    number = 112 if os.name == "nt" else errno.ENOSPC
    with pytest.raises(MambakitError, match="disk is full"), atomic_write(tmp_path / "a"):
        raise RuntimeError(f"I/O error: No space left on device (os error {number})")


def test_a_bug_in_the_body_is_not_explained_away(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="bug"), atomic_write(tmp_path / "a"):
        raise RuntimeError("bug")


def test_an_error_about_another_file_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_write(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "denied", str(tmp_path / "source.txt"))


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(MambakitError, match="part of this path is a file"),
        atomic_write(tmp_path / "file" / "below" / "a"),
    ):
        pass
