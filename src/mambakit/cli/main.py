"""The `mambakit` command: finds the subcommand, imports only that, and turns errors into one line.

Exit codes: 0 done, 1 a bug in mambakit (with its traceback), 2 a wrong input, 130 Ctrl-C,
141 the reader of our output went away, 143 SIGTERM.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from mambakit import __version__
from mambakit.errors import ArgumentError, MambakitError

COMMANDS = {
    "demo": "train a small model on Python's own source code and read what it writes",
    "prepare": "turn text into token files for training",
    "train": "train a model, or go on with an interrupted run",
    "generate": "continue a text with a trained model",
    "evaluate": "measure perplexity and bits per byte on a text",
    "convert": "write a checkpoint in another format: mamba_ssm, transformers, llama.cpp",
    "quantise": "store a model with weights of eight or four bits",
    "reproduce": "run an experiment of the paper and compare",
    "bench": "measure how fast this machine runs the kernels and a model",
    "doctor": "show what this machine can run, and why",
}
"""Subcommands, each the module `mambakit.cli.<name>` with a function `run(args) -> exit code`."""

_HELP = """usage: mambakit [--version] [--help] COMMAND [OPTIONS] [--debug]

Selective state space models (Mamba): from text to a trained model that writes.

{commands}

`mambakit COMMAND --help` lists the options of a command; --debug shows the traceback of an error.
New here? Start with: mambakit demo"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no sign for a character shows another instead of failing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = _run([arg for arg in args if arg != "--debug"])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return _fail("interrupted", 130, debug)
    except MambakitError as error:
        return _fail(str(error), 2, debug)
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _fail(named, 2, debug)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail(f"not enough memory; use smaller sizes ({error})", 2, debug)


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
        print(_HELP.format(commands="\n".join(lines)))
        return 0
    if args[0] == "--version":
        print(f"mambakit {__version__}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(COMMANDS)}"
        raise ArgumentError(f"unknown command {name!r}; {hint}")
    module = importlib.import_module(f"mambakit.cli.{name}")
    code: int = module.run(rest)
    return code


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python or PyTorch got no memory; on a CPU, PyTorch says so in words only."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
