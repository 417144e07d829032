from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mambakit.cli.main import main
from mambakit.data import load_tokenizer
from mambakit.models import (
    MambaConfig,
    MambaLanguageModel,
    Quantisation,
    load_model,
    quantise,
    save_model,
)

FILES = {
    "mambakit": {"model.safetensors", "config.json"},
    "official": {"pytorch_model.bin", "config.json"},
    "huggingface": {"model.safetensors", "config.json"},
}


@pytest.fixture
def model() -> MambaLanguageModel:
    return MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=257))


@pytest.fixture(params=FILES)
def source(request, model, tmp_path):
    """A checkpoint of each format, with a tokenizer."""
    save_model(model, tmp_path / "source", request.param, load_tokenizer("bytes"))
    return tmp_path / "source"


def convert(*args) -> int:
    return main(["convert", *map(str, args)])


@pytest.mark.parametrize("format", FILES)
def test_every_format_to_every_other(source, model, tmp_path, capsys, format):
    out = tmp_path / "out" / "folder"
    assert convert(source, "--out", out, "--format", format) == 0
    assert {path.name for path in out.iterdir()} == FILES[format] | {"tokenizer.json"}
    assert load_model(out).lm_head.weight.equal(model.lm_head.weight)
    assert load_tokenizer(out).eos_id == 256
    count = model.config.num_parameters()
    line = f"{count:,} parameters in float32, with tokenizer, format {format}, in {out}\n"
    assert capsys.readouterr().out == line


def test_ids_of_no_token_are_padding_afterwards(source, model, tmp_path):
    assert convert(source, "--out", tmp_path / "out") == 0
    config = load_model(tmp_path / "out").config
    assert (config.vocab_size, config.padded_vocab_size) == (257, 264)


def test_gguf(source, tmp_path, capsys):
    assert (
        convert(source, "--out", tmp_path / "out", "--format", "gguf", "--precision", "float16")
        == 0
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    assert "parameters in float16, with tokenizer, format gguf" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_precision(source, model, tmp_path, precision):
    assert convert(source, "--out", tmp_path / "out", "--precision", precision) == 0
    dtype = getattr(torch, precision)
    assert load_model(tmp_path / "out").lm_head.weight.equal(model.lm_head.weight.to(dtype))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_stays_in_our_format(model, tmp_path, capsys, bits):
    quantise(model, Quantisation(bits=bits))
    save_model(model, tmp_path / "source", tokenizer=load_tokenizer("bytes"))
    assert convert(tmp_path / "source", "--out", tmp_path / "out", "--precision", "bfloat16") == 0
    assert f"parameters in {bits} bits, with tokenizer, format mambakit" in capsys.readouterr().out
    loaded = load_model(tmp_path / "out")
    assert loaded.quantisation == model.quantisation
    assert loaded.lm_head.codes.equal(model.lm_head.codes)
    assert loaded.backbone.norm_f.weight.dtype == torch.bfloat16
    for format in ("official", "huggingface", "gguf"):
        other = tmp_path / format
        assert convert(tmp_path / "source", "--out", other, "--format", format) == 2
        assert "but the model is quantised, wanted 'mambakit'" in capsys.readouterr().err
        assert not other.exists()


def test_a_run_folder_gives_its_last_checkpoint(model, tmp_path):
    for step in (1, 2):
        model.lm_head.weight.data.fill_(step)
        save_model(model, tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    assert convert(tmp_path / "run", "--out", tmp_path / "out") == 0
    assert load_model(tmp_path / "out").lm_head.weight[0, 0] == 2


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, "a": 1, "b": 2}, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_the_tokenizer_is_the_one_that_is_named(source, tmp_path):
    write_tokenizer(tmp_path)
    out = tmp_path / "out"
    flags = ("--format", "huggingface", "--tokenizer", tmp_path / "tokenizer.json")
    assert convert(source, "--out", out, *flags) == 0
    assert load_tokenizer(out).eos_id == 0
    description = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert description["eos_token_id"] == 0


def test_without_a_tokenizer(model, tmp_path, capsys):
    save_model(model, tmp_path / "source")
    assert convert(tmp_path / "source", "--out", tmp_path / "out", "--format", "official") == 0
    assert "without a tokenizer" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_is_there_is_not_overwritten(source, tmp_path, capsys, is_folder):
    out = source if is_folder else source / "config.json"
    before = {path: path.read_bytes() for path in source.iterdir()}
    assert convert(source, "--out", out) == 2
    assert f"out: {out} is not an empty folder; name a new one" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_an_empty_folder_may_be_there(source, tmp_path):
    (tmp_path / "out").mkdir()
    assert convert(source, "--out", tmp_path / "out") == 0


def test_wrong_inputs(source, tmp_path, capsys):
    for args, message in {
        ("/nowhere/at/all", "--out", tmp_path / "a"): "is neither a checkpoint",
        (source, "--out", tmp_path / "b", "--format", "pt"): "invalid choice 'pt'",
        (source,): "--out",
        (source, "--out", tmp_path / "c", "--tokenizer", "none.json"): "tokenizer: none.json is no",
    }.items():
        assert convert(*args) == 2
        assert message in capsys.readouterr().err
    assert not [*tmp_path.glob("[abc]")]


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_other_formats_and_tokenizers_in_other_commands(source, tmp_path, capsys, command):
    (tmp_path / "text.txt").write_text("abc", encoding="utf-8")
    rest = {
        "generate": ["--prompt", "x", "--max-tokens", "2"],
        "evaluate": [str(tmp_path / "text.txt")],
    }[command]
    args = [command, "--checkpoint", str(source), "--device", "cpu", *rest]
    assert main(args) == 0
    expected = capsys.readouterr().out if command == "evaluate" else None
    (source / "tokenizer.json").unlink()
    assert main(args) == 2
    assert "has no tokenizer.json; name the model's with --tokenizer" in capsys.readouterr().err
    assert main([*args, "--tokenizer", "bytes"]) == 0
    assert expected in (None, capsys.readouterr().out)
