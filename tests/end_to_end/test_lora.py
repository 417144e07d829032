"""A checkpoint is adapted to a text in one command, and all commands open the result."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mambakit.cli.main import main
from mambakit.models import load_model

pytest.importorskip("peft")

TEXT = "".join(f"{n} green bottles hanging on the wall, {n} green bottles.\n" for n in range(900))

Command = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that the base has never seen."""
    folder = tmp_path_factory.mktemp("song")
    (folder / "song.txt").write_text(TEXT, encoding="utf-8")
    assert main(["prepare", str(folder / "song.txt"), "--out", str(folder / "tokens")]) == 0
    return folder


@pytest.fixture(scope="module")
def lora_command(song: Path, trained: Path) -> Command:
    def make(out: Path) -> list[str]:
        flags = (
            "--steps 40 --save-every 4 --valid-every 0 --lr 0.02 --device cpu --seqlen 32 "
            "--batch-size 2 --lora --lora-rank 4 --lora-dropout 0.1"
        )
        names = ["--data", str(song / "tokens"), "--out", str(out), "--init-from", str(trained)]
        return ["train", *names, *flags.split()]

    return make


@pytest.fixture(scope="module")
def adapted(lora_command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "adapted"
    assert main(lora_command(out)) == 0
    return out


def last(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def nats(checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> float:
    capsys.readouterr()
    options = ["--seqlen", "64", "--device", "cpu"]
    assert main(["evaluate", "--checkpoint", str(checkpoint), str(text), *options]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("nats per token")]
    return float(line.split()[-1])


def test_checkpoints_of_adapters_are_small(adapted: Path, trained: Path) -> None:
    whole = sum(path.stat().st_size for path in last(trained).iterdir())
    small = {path.name: path.stat().st_size for path in last(adapted).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "training_state.pt"} < set(small)
    assert "model.safetensors" not in small
    assert sum(small.values()) < whole / 2


def test_the_result_is_evaluated_converted_and_quantised_like_any_run(
    adapted: Path,
    trained: Path,
    song: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    after = nats(adapted, song / "song.txt", capsys)
    assert after < nats(trained, song / "song.txt", capsys) - 0.3
    assert nats(last(adapted), song / "song.txt", capsys) == after
    for format in ("mambakit", "huggingface"):
        out = tmp_path / format
        assert main(["convert", str(adapted), "--out", str(out), "--format", format]) == 0
        assert nats(out, song / "song.txt", capsys) == pytest.approx(after, abs=1e-4)
    assert main(["quantise", str(adapted), "--out", str(tmp_path / "int8")]) == 0
    assert nats(tmp_path / "int8", song / "song.txt", capsys) == pytest.approx(after, abs=0.02)


def test_the_result_writes(adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    options = "--prompt 7 --max-tokens 30 --temperature 0 --device cpu"
    assert main(["generate", "--checkpoint", str(adapted), *options.split()]) == 0
    written = capsys.readouterr().out
    model = load_model(last(adapted))
    (expected,) = model.generate([list(b"7")], max_tokens=30, temperature=0)
    assert written.rstrip("\n").encode() == b"7" + bytes(expected).rstrip(b"\n")


def test_a_killed_run_goes_on_bit_for_bit(
    lora_command: Command, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "mambakit", *lora_command(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((run / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert last(run).name != "step-00000040", "killed too late to test anything"
    assert main(["train", "--config", str(run / "config.toml")]) == 0
    err = capsys.readouterr().err
    assert "training 0.0" in err
    assert " M of 0.0" in err
    assert "going on from step" in err
    # Not the bytes of the files: safetensors writes metadata in any order.
    ours, theirs = (
        load_file(last(folder) / "adapter_model.safetensors") for folder in (run, adapted)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [(folder / "log.jsonl").read_text(encoding="utf-8") for folder in (run, adapted)]
    ends = [json.loads(log.splitlines()[-1])["valid_loss_nats"] for log in logs]
    assert ends[0] == ends[1]


def test_samples_are_without_dropout(
    lora_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--steps 4 --sample-every 4 --sample-prompt 7 --lr 1e-9 --min-lr 0"
    samples = []
    for dropout in ("0.9", "0.0"):
        run = tmp_path / dropout
        assert main([*lora_command(run), *options.split(), "--lora-dropout", dropout]) == 0
        log = (run / "log.jsonl").read_text(encoding="utf-8")
        samples += [json.loads(x)["sample"] for x in log.splitlines() if "sample" in json.loads(x)]
    assert len(samples) == 2
    assert samples[0] == samples[1]


def test_full_fine_tuning_of_a_checkpoint(
    trained: Path, song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--steps 1 --lr 1e-9 --min-lr 0 --device cpu --seqlen 32 --batch-size 2"
    names = ["--data", str(song / "tokens"), "--out", str(tmp_path), "--init-from", str(trained)]
    assert main(["train", *names, *flags.split()]) == 0
    before, after = load_model(last(trained)), load_model(last(tmp_path))
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
