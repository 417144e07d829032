from __future__ import annotations

import dataclasses
import io
from typing import Literal

import pytest

from mambakit.cli.parsing import parse
from mambakit.errors import ArgumentError, ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """Inside."""

    width: int = 3
    """How wide it is, told at such a length that the line has to be wrapped in the help text."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"width is {self.width}, not at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command does."""

    size: int
    """How big it is."""
    kind: Literal["round", "square"] = "round"
    """Which."""
    pair: tuple[float, float] = (1.0, 2.0)
    """Two numbers."""
    inner: Inner = Inner()


def test_options_become_fields() -> None:
    args = ["--size", "3", "--kind", "square", "--pair", "4", "5", "--inner.width", "6"]
    expected = Options(size=3, kind="square", pair=(4.0, 5.0), inner=Inner(width=6))
    assert parse(Options, args, "test") == expected


def test_defaults_can_be_given() -> None:
    default = Options(size=7, pair=(8.0, 9.0))
    assert parse(Options, ["--kind", "square"], "test", default) == dataclasses.replace(
        default, kind="square"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Missing from mambakit test: --size INT"),
        (
            ["--size", "1", "--kidn", "square"],
            "Unrecognized options: --kidn, square; Perhaps you meant: --kind {round,square}",
        ),
        (
            ["--size", "1", "--kind", "flat"],
            "invalid choice 'flat' for argument '--kind'. Expected one of ('round', 'square').",
        ),
        (["--size", "big"], "Error parsing --size: invalid literal for int() with base 10: 'big'"),
        (["--size", "1", "--pair", "2"], "Missing value for argument '--pair'. Expected 2 values."),
        (["--size", "1", "--inner.width", "0"], "width is 0, not at least 1"),
    ],
)
@pytest.mark.parametrize("stdout", ["file", "terminal", "latin-1"])
def test_a_mistake_is_one_line(
    args: list[str], message: str, stdout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = "latin-1" if stdout == "latin-1" else "utf-8"
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(stream, "isatty", lambda: stdout == "terminal")
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(ArgumentError) as caught:
        parse(Options, args, "test")
    assert str(caught.value) == f"{message} (mambakit test --help lists the options)"


def test_help_exits_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--help"], "test")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "What the command does." in out
    assert "How big it is." in out
