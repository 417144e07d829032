from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mambakit.cli.main import main
from mambakit.data import BytesTokenizer, load_tokenizer
from mambakit.models import (
    MambaConfig,
    MambaLanguageModel,
    Quantisation,
    load_model,
    quantise,
    save_model,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "float"
    save_model(MambaLanguageModel(MambaConfig(d_model=64, n_layer=2, vocab_size=257)), folder)
    BytesTokenizer().save(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a text to measure on\n" * 20, encoding="utf-8")
    return path


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], Quantisation(bits=8, group_size=64)),
        (["--bits", "4", "--group-size", "32"], Quantisation(bits=4, group_size=32)),
    ],
)
def test_other_commands_open_the_result(checkpoint, text, tmp_path, capsys, options, expected):
    out = tmp_path / "small"
    assert run("quantise", checkpoint, "--out", out, *options) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed
    assert "perplexity" not in printed
    assert load_model(out).quantisation == expected
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (checkpoint, out)]
    assert sizes[1] < 0.45 * sizes[0]
    assert run("generate", "--checkpoint", out, "--prompt", "a", "--max-tokens", "3") == 0
    assert run("evaluate", "--checkpoint", out, text) == 0


def test_perplexity_before_and_after(checkpoint, text, tmp_path, capsys):
    assert (
        run("quantise", checkpoint, "--out", tmp_path / "small", "--bits", "4", "--text", text) == 0
    )
    [printed] = [
        line.split()[1:]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("perplexity")
    ]
    before, _, after = printed
    found = []
    for folder in (checkpoint, tmp_path / "small"):
        assert run("evaluate", "--checkpoint", folder, text) == 0
        [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("perplexity")]
        found.append(line.split()[1])
    assert found == [before, after]
    assert before != after


@pytest.mark.parametrize("format", ["official", "huggingface"])
def test_other_formats_and_a_named_tokenizer(checkpoint, tmp_path, capsys, format):
    model, source, out = load_model(checkpoint), tmp_path / "source", tmp_path / "small"
    save_model(model, source, format)
    assert run("quantise", source, "--out", out) == 2
    assert "has no tokenizer.json; name the model's with --tokenizer" in capsys.readouterr().err
    assert run("quantise", source, "--out", out, "--tokenizer", "bytes") == 0
    assert load_tokenizer(out).eos_id == 256
    quantise(model, Quantisation())
    found = load_model(out).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    weights = [*source.glob("*.safetensors"), *source.glob("*.bin")]
    size = sum(path.stat().st_size for path in weights) / 1e6
    assert f"weights, MB     {size:>12,.1f}  to " in capsys.readouterr().out


def test_what_it_refuses(checkpoint, tmp_path, capsys):
    small = tmp_path / "small"
    run("quantise", checkpoint, "--out", small, "--bits", "4")
    capsys.readouterr()
    for args, message in (
        ((small, tmp_path / "again"), "is quantised to 4 bits already; give the checkpoint"),
        ((checkpoint, checkpoint), f"out: {checkpoint} is not an empty folder; name a new one"),
        ((checkpoint, small), f"out: {small} is not an empty folder; name a new one"),
        ((checkpoint, tmp_path / "x", "--bits", "3"), "bits"),
        ((checkpoint, tmp_path / "x", "--group-size", "48"), "group-size"),
        ((tmp_path / "nothing", tmp_path / "x"), "nothing"),
    ):
        source, out, *options = args
        assert run("quantise", source, "--out", out, *options) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "again").exists()
