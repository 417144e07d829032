from __future__ import annotations

import dataclasses

import pytest
import torch

from mambakit.reproduce import Draws, Experiment, InductionHeads, SelectiveCopying, evaluation
from mambakit.reproduce.evaluation import TEST, VALIDATION, Score, score_sequences, validate
from mambakit.reproduce.models import answer_logits, answer_logits_in_chunks, build


def run(model, task, recipe, seqlen, purpose=TEST, parts=None) -> Score:
    score = Score()
    for number, _ in enumerate(score_sequences(model, task, recipe, seqlen, purpose, score)):
        if parts is not None and number + 1 == parts:
            break
    return score


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("answers", [1, 4])
def test_chunks_do_not_matter(tiny: Experiment, chunk, answers):
    model = build(tiny.contestants["mamba"].model, 0)
    tokens = torch.randint(4, (3, 11))
    whole = answer_logits(model, tokens, answers)
    assert whole.shape == (3, answers, 8)
    torch.testing.assert_close(answer_logits_in_chunks(model, tokens, answers, chunk), whole)


def test_attention_sees_all_at_once(tiny: Experiment):
    model = build(tiny.contestants["attention"].model, 0)
    tokens = torch.randint(4, (3, 11))
    whole = answer_logits(model, tokens, 2)
    assert torch.equal(answer_logits_in_chunks(model, tokens, 2, 3), whole)


@pytest.mark.parametrize("name", ["mamba", "attention"])
@pytest.mark.parametrize(
    "task", [InductionHeads(4), SelectiveCopying(4, 3)], ids=["heads", "copying"]
)
def test_right_answers_are_counted(tiny: Experiment, recipe, name, task):
    model = build(tiny.contestants[name].model, 0)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # All logits are equal, so that the answer is always 0.
    targets = task.make(Draws(recipe.seed, TEST, torch.arange(7)), 1, 12).targets
    zeros = int((targets == 0).sum())
    assert (zeros > 0) == isinstance(task, InductionHeads)  # Copied data is never 0.
    score = run(model, task, recipe, 12)
    assert (score.correct, score.answers, score.sequences) == (zeros, targets.numel(), 7)
    assert score.accuracy == pytest.approx(100 * zeros / targets.numel())


@pytest.mark.parametrize("purpose", [TEST, VALIDATION])
def test_parts_do_not_matter(tiny: Experiment, recipe, purpose):
    model = build(tiny.contestants["mamba"].model, 0)
    small = dataclasses.replace(recipe, tokens_at_once=13)  # One sequence of 12 at once.
    whole = run(model, tiny.task, recipe, 12, purpose)
    assert whole == run(model, tiny.task, small, 12, purpose)
    assert whole.sequences == (7 if purpose == TEST else 5)
    begun = run(model, tiny.task, small, 12, purpose, parts=2)
    assert begun.sequences == 2
    for _ in score_sequences(model, tiny.task, small, 12, purpose, begun):
        pass
    assert begun == whole


def test_the_worst_length_is_the_validation(tiny: Experiment, recipe):
    model = build(tiny.contestants["mamba"].model, 0)
    accuracies = [run(model, tiny.task, recipe, n, VALIDATION).accuracy for n in (6, 9)]
    assert validate(model, tiny.task, recipe) == min(accuracies)


def test_out_of_memory_is_a_result(tiny: Experiment, recipe, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = build(tiny.contestants["attention"].model, 0)
    monkeypatch.setattr(evaluation, "answer_logits_in_chunks", run_out)
    score = run(model, tiny.task, recipe, 12)
    assert (score.error, score.sequences) == ("out of memory", 0)
    assert validate(model, tiny.task, recipe) == 0.0
