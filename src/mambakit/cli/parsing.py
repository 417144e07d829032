"""Options from a dataclass through tyro, with every mistake told in one line."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

from mambakit.errors import ArgumentError

Options = TypeVar("Options")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


def parse(
    kind: type[Options], args: Sequence[str], command: str, default: Options | None = None
) -> Options:
    """Parse the arguments of a subcommand into its dataclass, or print its help and exit with 0.

    Args:
        kind: Dataclass whose fields are the options; the docstrings below them are the help.
        args: Arguments after the subcommand's name.
        command: Name of the subcommand.
        default: Values of the options that are not given; default: those of the class.

    Raises:
        ArgumentError: An option is unknown, missing, or has a value it cannot take.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                prog=f"mambakit {command}",
                args=args,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.DisallowNone,),
            )
    except SystemExit as stop:
        if stop.code:
            raise ArgumentError(_one_line(complaint.getvalue(), command)) from None
        raise


def _one_line(box: str, command: str) -> str:
    """Put the text of tyro's error box on one line, without the help texts that it repeats.

    Rows are "│ text │" between a title and a border; or "  text  " where stdout is not UTF-8. On a
    terminal they are coloured.
    """
    parts: list[str] = []
    for row in _COLOUR.sub("", box).splitlines()[1:]:
        text = row.replace("│", " ")[2:].rstrip()
        if text.startswith(("For full helptext", "Argument helptext")):
            break
        is_rule = not text.strip("─-╰╯")
        is_help = text.startswith(" " * 8)
        if is_rule and parts:
            parts[-1] += ";"
        elif not is_rule and not is_help:
            parts.append(text.strip())
    message = re.sub(r"^Error parsing [\w.]+: ", "", " ".join(parts).rstrip(";"))
    return f"{message} (mambakit {command} --help lists the options)"
