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
    """Put the text of tyro's error box on one line, without the help texts that it repeats."""
    rows = [row.strip("│").rstrip() for row in box.splitlines() if row.startswith("│")]
    kept = []
    for row in rows:
        text = row.strip()
        if text.startswith(("For full helptext", "Argument helptext")):
            break
        if not row.startswith(" " * 9):
            kept.append(";" if text.startswith("─") else text)
    message = " ".join(kept).replace(" ;", ";").rstrip(";")
    message = re.sub(r"^Error parsing [\w.]+: ", "", message)
    return f"{message} (mambakit {command} --help lists the options)"
