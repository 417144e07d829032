from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable, Sequence

import pytest

from mambakit import __version__
from mambakit.cli import main as main_module
from mambakit.cli.main import COMMANDS, main
from mambakit.errors import DataError


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mambakit {__version__}\n"


def test_every_command_has_a_module_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert f"usage: mambakit {name}" in capsys.readouterr().out


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_no_torch_and_answers_at_once(args: list[str]) -> None:
    code = (
        "import sys, time\n"
        "from mambakit.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, time.process_time(), file=sys.stderr)\n"
    )
    times = []
    # The best of three: the first reads modules from disk, and a busy machine stretches processor time too.
    for _ in range(3):
        loaded, seconds = run_python(code, *args).stderr.split()
        assert loaded == "False"
        times.append(float(seconds))
        if times[-1] < 0.5:
            return
    pytest.fail(f"took {times} s of processor time, more than 0.5")


def test_an_unknown_command_gets_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'trian'; did you mean 'train'?\n"
    assert main(["xyz"]) == 2
    assert "there are: demo, prepare, train" in capsys.readouterr().err


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Callable[..., int]]:
    """Makes the command "doctor" raise an error."""

    def give(error: BaseException) -> Callable[..., int]:
        def run(args: Sequence[str]) -> int:
            raise error

        module = types.SimpleNamespace(run=run)
        monkeypatch.setattr(main_module.importlib, "import_module", lambda name: module)
        return lambda *flags: main(["doctor", *flags])

    return give


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("two\nlines"), 2, "error: two lines"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: x: No such file"),
        (OSError("odd"), 2, "error: odd"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (MemoryError(), 2, "error: not enough memory; use smaller sizes"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            2,
            "error: not enough memory; use smaller sizes (DefaultCPUAllocator: can't allocate",
        ),
    ],
)
def test_an_error_is_one_line(
    error: BaseException,
    code: int,
    message: str,
    run_command: Callable[..., Callable[..., int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(error)() == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_debug_shows_the_traceback(
    run_command: Callable[..., Callable[..., int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(DataError("wrong"))("--debug") == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("mambakit.errors.DataError: wrong\nerror: wrong\n")


def test_a_bug_keeps_its_traceback(run_command: Callable[..., Callable[..., int]]) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(RuntimeError("a bug"))()


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "mambakit", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141
