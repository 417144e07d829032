"""Whatever is wrong with the input, it takes one clear line and exit code 2, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambakit.cli.main import main

Refuse = Callable[..., str]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs a command that must fail, and gives its one line of complaint."""

    def run(*args: object) -> str:
        capsys.readouterr()
        assert main([str(arg) for arg in args]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return run


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        (b"", "is empty"),
        (b"\x00\x01\x02\xff" * 100, "binary"),
        (b"caf\xe9 au lait\n", "not UTF-8"),
    ],
    ids=["missing", "empty", "binary", "latin-1"],
)
def test_text_that_cannot_be_prepared(
    refuse: Refuse, tmp_path: Path, content: bytes | None, message: str
) -> None:
    source = tmp_path / "text.txt"
    if content is not None:
        source.write_bytes(content)
    line = refuse("prepare", source, "--out", tmp_path / "tokens")
    assert "text.txt" in line
    assert message in line
    assert not (tmp_path / "tokens").exists()


def test_wrongly_encoded_text_gets_a_remedy_that_works(refuse: Refuse, tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", b"caf\xe9 au lait\n" * 9)
    out = tmp_path / "tokens"
    line = refuse("prepare", source, "--out", out)
    assert "--errors replace" in line
    assert "byte 3" in line
    assert main(["prepare", str(source), "--out", str(out), "--errors", "replace"]) == 0


def test_a_corpus_shorter_than_one_sequence(refuse: Refuse, tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", b"short\n")
    assert main(["prepare", str(source), "--out", str(tmp_path / "tokens")]) == 0
    line = refuse("train", "--data", tmp_path / "tokens", "--out", tmp_path / "run")
    assert "fewer than one window of 512 + 1; give more text or choose a shorter seqlen" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stpes", "3"], "Unrecognized options: --stpes, 3; Perhaps you meant: --steps INT"),
        (["--steps", "0"], "steps is 0, not an integer from 1"),
        (["--batch-size", "-1"], "batch_size is -1, not an integer from 1"),
        (["--seqlen", "99999999999"], "seqlen is 99999999999, not an integer from 1 to 16777216"),
        (["--d-model", "0"], "d_model is 0, not an integer from 1"),
        (["--d-model", "60000", "--n-layer", "4000"], "but the limit is"),
        (["--d-model", "40000", "--n-layer", "20"], "GiB; choose a smaller model"),
        (["--vocab-size", "100"], "vocab_size is 100, but the tokenizer of"),
        (["--device", "tpu"], "device is 'tpu', not auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "device is 'cuda:99', but PyTorch finds"),
        (["--lr", "fast"], "could not convert string to float: 'fast'"),
    ],
)
def test_wrong_training_options(
    refuse: Refuse, tokens: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    out = tmp_path / "run"
    assert message in refuse("train", "--data", tokens, "--out", out, *flags)
    assert not out.exists()


def test_an_unknown_key_of_a_config_file(refuse: Refuse, tokens: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("warmpu = 0.2", encoding="utf-8")
    line = refuse("train", "--data", tokens, "--out", tmp_path / "run", "--config", config)
    assert line == "training config: unknown field 'warmpu'; did you mean 'warmup'?"


def test_a_folder_that_is_not_prepared(refuse: Refuse, tmp_path: Path) -> None:
    for data, what in ((tmp_path, "has no manifest.json"), (tmp_path / "nothing", "is not there")):
        line = refuse("train", "--data", data, "--out", tmp_path / "run")
        assert line == (
            f"{data}: not a folder of prepared tokens, it {what}; make one with mambakit prepare"
        )


@pytest.mark.parametrize("place", ["", "runs/first"])
def test_a_run_in_the_folder_of_its_data(refuse: Refuse, tokens: Path, place: str) -> None:
    out, files = tokens / place, sorted(os.listdir(tokens))
    line = refuse("train", "--data", tokens, "--out", out)
    assert line == (
        f"training config: out is {out}, in the folder of prepared tokens; choose another folder for the run"
    )
    assert sorted(os.listdir(tokens)) == files


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_folder_that_cannot_be_made(
    refuse: Refuse, tokens: Path, tmp_path: Path, command: str
) -> None:
    out = write(tmp_path / "file", b"") / "folder"
    source = write(tmp_path / "text.txt", b"text\n" * 9)
    args = ["--data", tokens] if command == "train" else [source]
    assert f"{out}" in (line := refuse(command, *args, "--out", out))
    assert "cannot be written" in line


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser writes anywhere")
def test_a_folder_without_permission(refuse: Refuse, tokens: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    line = refuse("train", "--data", tokens, "--out", tmp_path / "run")
    assert "no permission to write there" in line


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(trained / "checkpoints" / "step-00000030", copy)
    return copy


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def poison(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["backbone.norm_f.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors")


def edit(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = json.dumps({**config, **changes})
        (folder / "config.json").write_text(text, encoding="utf-8")

    return change


def widen(folder: Path) -> None:
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text.replace(": 16", ": 24", 1), encoding="utf-8")


def forget_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is neither a checkpoint"),
        (cut, "is damaged or cut off"),
        (widen, "got shape (264, 16), wanted (264, 24)"),
        (edit(version=3), "has version 3"),
        (edit(format="other"), "is of another program"),
        (forget_tokenizer, "has no tokenizer.json"),
    ],
    ids=["missing", "cut", "other model", "newer", "other program", "no tokenizer"],
)
@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_checkpoint_that_cannot_be_used(
    refuse: Refuse,
    checkpoint: Path,
    tokens: Path,
    damage: Callable[[Path], None],
    message: str,
    command: str,
) -> None:
    damage(checkpoint)
    rest = [tokens] if command == "evaluate" else ["--prompt", "x"]
    assert message in refuse(command, "--checkpoint", checkpoint, *rest)


def test_weights_that_are_nan(refuse: Refuse, checkpoint: Path) -> None:
    poison(checkpoint)
    with pytest.warns(UserWarning, match=r"NaN or infinite numbers in backbone\.norm_f\.weight"):
        line = refuse("generate", "--checkpoint", checkpoint, "--prompt", "x")
    assert "logits: got NaN or infinite numbers" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature: got -1.0, wanted at least 0"),
        (["--top-k", "0"], "top_k: got 0, wanted at least 1"),
        (["--max-tokens", "-3"], "max_tokens: got -3"),
        (["--prompt-file", "none.txt"], "none.txt"),
        (["--tempreature", "1"], "Perhaps you meant: --temperature FLOAT"),
    ],
)
def test_wrong_generation_options(
    refuse: Refuse, trained: Path, flags: list[str], message: str
) -> None:
    assert message in refuse("generate", "--checkpoint", trained, "--prompt", "x", *flags)


def test_a_prompt_that_is_no_text(refuse: Refuse, trained: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "prompt.txt", b"caf\xe9")
    line = refuse("generate", "--checkpoint", trained, "--prompt-file", file)
    assert line == f"{file}: is not utf-8 text (unexpected end of data)"


def test_a_model_of_another_tokenizer(refuse: Refuse, trained: Path, tmp_path: Path) -> None:
    import tokenizers

    vocabulary = {"a": 0, "b": 1, "</s>": 2}
    other = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    other.decoder = tokenizers.decoders.ByteLevel()
    other.save(str(tmp_path / "tokenizer.json"))
    source = write(tmp_path / "text.txt", b"abba" * 30)
    out = tmp_path / "tokens"
    args = ["prepare", source, "--out", out, "--tokenizer", tmp_path / "tokenizer.json"]
    assert main([str(arg) for arg in args]) == 0
    line = refuse("evaluate", "--checkpoint", trained, out)
    assert "was prepared with another tokenizer" in line


def test_nothing_to_evaluate(refuse: Refuse, trained: Path) -> None:
    line = refuse("evaluate", "--checkpoint", trained)
    assert line == "give a prepared folder or text files to evaluate on, or --tasks"


def test_the_demo_refuses_an_absurd_time(refuse: Refuse, tmp_path: Path) -> None:
    assert "minutes: got 0.0" in refuse("demo", "--minutes", "0", "--out", tmp_path / "run")
