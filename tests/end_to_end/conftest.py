from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mambakit.cli.main import main

TEXT = "".join(f"line {n}: {n * n} is the square of {n}\n" for n in range(600))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums in the order of one thread, here and in the processes that tests start."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    assert main(["prepare", str(folder / "text.txt"), "--out", str(folder / "tokens")]) == 0
    return folder / "tokens"


@pytest.fixture(scope="session")
def train_command(tokens: Path) -> Callable[[Path], list[str]]:
    """Arguments of a run of a second, 30 steps long with a checkpoint after every third."""

    def make(out: Path) -> list[str]:
        flags = (
            "--steps 30 --save-every 3 --log-every 2 --valid-every 10 --lr 0.02 --device cpu "
            "--seqlen 32 --batch-size 2 --d-model 16 --n-layer 2"
        )
        return ["train", "--data", str(tokens), "--out", str(out), *flags.split()]

    return make


@pytest.fixture(scope="session")
def trained(
    train_command: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(train_command(out)) == 0
    return out
