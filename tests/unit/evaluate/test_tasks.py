from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval; pip install 'mambakit[eval]'")

from lm_eval.tasks import TaskManager

from mambakit.data import BytesTokenizer
from mambakit.errors import ArgumentError, DataError
from mambakit.evaluate import tasks
from mambakit.evaluate.harness import HarnessModel
from mambakit.evaluate.likelihood import log_likelihoods
from mambakit.evaluate.tasks import evaluate_tasks
from mambakit.models import MambaConfig, MambaLanguageModel

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # lm_eval's own.
    pytest.mark.usefixtures("quick_lm_eval"),
]
EOS = BytesTokenizer.eos_id


@pytest.fixture
def model() -> MambaLanguageModel:
    return MambaLanguageModel(MambaConfig(d_model=24, n_layer=2, vocab_size=257)).eval()


@pytest.fixture
def examples(task_folder):
    return [json.loads(line) for line in (task_folder / "squares.jsonl").read_text().splitlines()]


def run(model, task_folder, *names, **options):
    harness = HarnessModel(model, BytesTokenizer())
    return evaluate_tasks(harness, names, include_path=task_folder, **options)


def scores(model, pairs):
    ids = [([*context.encode()] or [EOS], [*rest.encode()]) for context, rest in pairs]
    found = dict(log_likelihoods(model, ids))
    return [found[index].log_prob for index in range(len(ids))]


def test_metrics_of_every_kind(model, task_folder, examples):
    names = ("squares_choice", "squares_answer", "squares_text", "squares_written")
    results = run(model, task_folder, *names)["results"]
    questions = [example["question"] for example in examples]

    right = 0
    for example in examples:
        values = scores(model, [(example["question"], ending) for ending in example["choices"]])
        right += max(values) == values[1]
    assert results["squares_choice"]["acc,none"] == right / 12

    answers = scores(model, [(example["question"], example["answer"]) for example in examples])
    assert results["squares_answer"]["perplexity,none"] == pytest.approx(
        math.exp(-sum(answers) / 12)
    )
    texts = scores(model, [("", question) for question in questions])
    bits = -sum(texts) / math.log(2) / sum(map(len, questions))
    assert results["squares_text"]["bits_per_byte,none"] == pytest.approx(bits)
    assert results["squares_written"]["exact_match,none"] == 0.0


def test_a_model_that_knows_the_answers(reciting_model, task_folder, tmp_path):
    example = {"question": "abc", "answer": "def", "choices": ["dfe", "def", "e"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(example) + "\n")
    for name in ("squares_choice", "squares_answer", "squares_written"):
        fields = json.loads((task_folder / f"{name}.yaml").read_text())
        fields["dataset_kwargs"]["data_files"] = {"test": str(tmp_path / "data.jsonl")}
        fields["metric_list"] += [{"metric": "acc"}] * (name == "squares_answer")
        if name == "squares_written":
            fields["generation_kwargs"]["until"] = ["g"]
        (tmp_path / f"{name}.yaml").write_text(json.dumps(fields))
    names = ("squares_choice", "squares_answer", "squares_written")
    results = run(reciting_model, tmp_path, *names)["results"]
    assert results["squares_choice"]["acc,none"] == 1.0
    assert results["squares_answer"]["acc,none"] == 1.0
    assert results["squares_answer"]["perplexity,none"] == pytest.approx(1.0, abs=0.01)
    assert results["squares_written"]["exact_match,none"] == 1.0


def test_limit_and_examples_in_front(model, task_folder, examples):
    few = run(model, task_folder, "squares_answer", limit=2)
    assert len(few["samples"]["squares_answer"]) == 2
    share = run(model, task_folder, "squares_answer", limit=0.25)
    assert len(share["samples"]["squares_answer"]) == 3
    shots = run(model, task_folder, "squares_answer", limit=1, num_fewshot=2)
    (context, _), *_ = shots["samples"]["squares_answer"][0]["arguments"]
    assert context.count("is the square of") == 3
    assert context.endswith(examples[0]["question"])


def test_files_wildcards_and_repeats(model, task_folder, monkeypatch):
    monkeypatch.setattr(tasks, "_Tasks", own_tasks_only)
    results = run(model, task_folder, "squares_t*", "squares_text", limit=1)["results"]
    assert list(results) == ["squares_text"]
    file = task_folder / "squares_answer.yaml"
    harness = HarnessModel(model, BytesTokenizer())
    assert list(evaluate_tasks(harness, [str(file)], limit=1)["results"]) == ["squares_answer"]


def own_tasks_only(include_path, include_defaults=True):
    """Reading the 14,000 files of lm_eval takes ten seconds."""
    return TaskManager(include_path=include_path, include_defaults=False)


def test_tasks_that_are_not_there(model, task_folder, monkeypatch):
    monkeypatch.setattr(tasks, "_Tasks", own_tasks_only)
    with pytest.raises(
        ArgumentError, match="got 'squares_texts', wanted .* did you mean squares_text"
    ):
        run(model, task_folder, "squares_texts")
    with pytest.raises(ArgumentError, match="got 'qqq', .*; `lm_eval ls tasks` lists them"):
        run(model, task_folder, "qqq")


def test_a_task_without_its_data(model, task_folder, tmp_path):
    fields = json.loads((task_folder / "squares_text.yaml").read_text())
    fields["dataset_kwargs"]["data_files"] = {"test": str(tmp_path / "missing.jsonl")}
    (tmp_path / "broken.yaml").write_text(json.dumps(fields | {"task": "broken"}))
    with pytest.raises(
        DataError, match=r"tasks: broken cannot be loaded \(FileNotFoundError: .*missing"
    ):
        run(model, tmp_path, "broken")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ((), {}, "tasks: got none"),
        (("squares_text",), {"limit": 0}, "limit: got 0"),
        (("squares_text",), {"num_fewshot": -1}, "num_fewshot: got -1"),
        (("squares_text",), {"include_path": "nowhere"}, "include_path: nowhere is no folder"),
    ],
)
def test_wrong_arguments(model, task_folder, names, options, message):
    with pytest.raises(ArgumentError, match=message):
        evaluate_tasks(
            HarnessModel(model, BytesTokenizer()), names, **{"include_path": task_folder} | options
        )
