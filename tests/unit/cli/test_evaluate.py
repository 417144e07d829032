from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mambakit.cli.evaluate import _plain
from mambakit.cli.main import main
from mambakit.data import BytesTokenizer
from mambakit.models import MambaConfig, MambaLanguageModel

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HAS_LM_EVAL, reason="needs lm-eval")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = MambaLanguageModel(MambaConfig(d_model=24, n_layer=2, vocab_size=257))
    model.save_pretrained(folder, tokenizer=BytesTokenizer())
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text("one and two\n" * 9)
    return tmp_path / "text.txt"


def evaluate(checkpoint: Path, *args: object) -> int:
    flags = ("--checkpoint", checkpoint, "--device", "cpu")
    return main(["evaluate", *map(str, flags), *map(str, args)])


def test_the_result_of_a_text_as_json(checkpoint, text, tmp_path, capsys):
    assert evaluate(checkpoint, text, "--output", tmp_path / "new" / "out.json") == 0
    result = json.loads((tmp_path / "new" / "out.json").read_text())
    assert result["tokens"] == 108
    assert f"{result['perplexity']:.3f}" in capsys.readouterr().out
    assert evaluate(checkpoint, text) == 0


def test_a_result_that_cannot_be_written_is_found_before_the_work(
    checkpoint, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("mambakit.cli.evaluate._on_text", lambda *_: pytest.fail("the work began"))
    assert evaluate(checkpoint, text, "--output", text / "out.json") == 2
    assert "a part of this path is a file, not a folder" in capsys.readouterr().err
    assert evaluate(checkpoint, text, "--output", tmp_path) == 2
    assert f"--output {tmp_path}: is a folder; name a file in it" in capsys.readouterr().err


def test_the_key_of_the_text_in_json_lines(checkpoint, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"body": "one and two"}\n' * 3)
    assert evaluate(checkpoint, tmp_path / "a.jsonl", "--text-key", "body") == 0
    assert "tokens                    35" in capsys.readouterr().out
    assert evaluate(checkpoint, tmp_path / "a.jsonl") == 2
    assert "choose one with --text-key" in capsys.readouterr().err


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # lm_eval's own.
@pytest.mark.usefixtures("quick_lm_eval")
def test_tasks_end_with_a_table_and_json(checkpoint, task_folder, tmp_path, capsys):
    flags = ("--include-path", task_folder, "--limit", 3, "--num-fewshot", 1, "--batch-size", 2)
    output = ("--max-length", 40, "--output", tmp_path / "out.json")
    names = "squares_answer, squares_text"
    assert evaluate(checkpoint, "--tasks", names, *flags, *output) == 0
    printed = capsys.readouterr()
    rows = [line.split("|")[1:-1] for line in printed.out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    result = json.loads((tmp_path / "out.json").read_text())
    value = result["results"]["squares_answer"]["perplexity,none"]
    (row,) = [row for row in cells if row[0] == "squares_answer"]
    assert row[3:5] == ["1", "perplexity"]
    assert float(row[6]) == pytest.approx(value, abs=1e-3)
    assert [row[0] for row in cells[2:]] == ["squares_answer", "squares_text"]
    assert result["config"]["limit"] == 3
    assert result["config"]["max_length"] == 40
    assert result["config"]["batch_size"] == 2
    assert result["config"]["random_seed"] == 0
    assert "samples" not in result
    assert "Scoring: 100%" in printed.err


def test_numbers_of_numpy_are_numbers_in_json():
    values = {"count": np.int64(3), "right": np.bool_(True), "file": Path("a")}
    text = json.dumps(values, default=_plain)
    assert json.loads(text) == {"count": 3, "right": True, "file": "a"}


def test_without_lm_eval(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert evaluate(checkpoint, "--tasks", "lambada_openai") == 2
    assert capsys.readouterr().err == "error: --tasks needs lm-eval; pip install 'mambakit[eval]'\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give a prepared folder or text files to evaluate on, or --tasks"),
        (("a.txt", "--seqlen", "0"), "seqlen: got 0, wanted at least 1"),
        (("--tasks", "x", "--batch-size", "0"), "batch_size: got 0, wanted at least 1"),
        (("a.txt", "--limit", "3"), "--limit: is for --tasks, not for a text"),
        (("a.txt", "--max-length", "3", "--num-fewshot", "1"), "--num-fewshot, --max-length: is"),
        (("a.txt", "--tasks", "x"), "got --tasks and a.txt, wanted either of them"),
        (("--tasks", "x", "--seqlen", "3"), "--seqlen: is for a text, not for --tasks"),
        (("--tasks", "x", "--documents"), "--documents: is for a text, not for --tasks"),
    ],
)
def test_options_that_do_not_belong_together(checkpoint, args, message, capsys):
    assert evaluate(checkpoint, *args) == 2
    assert message in capsys.readouterr().err
