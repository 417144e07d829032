from __future__ import annotations

from collections.abc import Iterator

import pytest

from mambakit import generate
from mambakit.cli import loading
from mambakit.cli.main import main


def interrupted(*args: object, **options: object) -> Iterator[tuple[int, str]]:
    yield 0, "one"
    yield len(args[2]) - 1, " two"  # type: ignore[arg-type]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("prompts", "printed"),
    [(["a "], "a one two\n"), (["a ", "b"], "a one\n\n---\n\nb two\n")],
)
def test_ctrl_c_leaves_what_was_written(monkeypatch, capsys, prompts, printed):
    monkeypatch.setattr(loading, "load_checkpoint", lambda *args: (None, None))
    monkeypatch.setattr(generate, "stream_text", interrupted, raising=False)
    assert main(["generate", "--checkpoint", "x", "--prompt", *prompts]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == (printed, "error: interrupted\n")
