"""Accuracy of a model on sequences of any length, in pieces that can be interrupted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from mambakit.models.language_model import MambaLanguageModel
from mambakit.reproduce.draws import Draws
from mambakit.reproduce.experiment import Task
from mambakit.reproduce.models import SequenceModel, answer_logits_in_chunks, autocast
from mambakit.reproduce.recipe import Recipe

TRAINING, VALIDATION, TEST = range(3)
"""Streams of random numbers, one for each purpose."""
CHUNK = 2**15
"""Positions that a Mamba model reads at once; its state goes on from there."""
OUT_OF_MEMORY = "out of memory"
"""What stands for a number where a device's memory did not hold the test."""


@dataclasses.dataclass
class Score:
    """Right answers so far on sequences of one length."""

    correct: int = 0
    """Answers that were right."""
    answers: int = 0
    """Answers asked for."""
    sequences: int = 0
    """Sequences tested."""
    error: str | None = None
    """Why the test could not go on."""

    @property
    def accuracy(self) -> float:
        """Share of right answers in percent."""
        return 100 * self.correct / self.answers


def score_sequences(
    model: SequenceModel, task: Task, recipe: Recipe, seqlen: int, purpose: int, score: Score
) -> Iterator[None]:
    """Test a model on the sequences of one length that `score` lacks, and yield after each part.

    Sequence i of a purpose is the same whatever the size of the parts. A part that the memory does not hold ends the
    test with an error in the score.

    Args:
        model: On the device where the data shall be made.
        task: Makes the sequences.
        recipe: Says how many there are, and how many tokens to work on at once.
        seqlen: Length of the sequences, as the task counts it.
        purpose: VALIDATION or TEST.
        score: Is updated.
    """
    is_test = purpose == TEST
    wanted = recipe.test_sequences if is_test else recipe.validation_sequences
    at_once = seqlen if not isinstance(model, MambaLanguageModel) else min(seqlen, CHUNK)
    part = max(1, recipe.tokens_at_once // at_once)
    device = next(model.parameters()).device
    while score.sequences < wanted and score.error is None:
        count = min(part, wanted - score.sequences)
        try:
            draws = Draws(
                recipe.seed, purpose, torch.arange(count, device=device) + score.sequences
            )
            with autocast(recipe, device):
                correct, answers = _test_part(model, task, draws, seqlen)
        except torch.OutOfMemoryError:
            score.error = OUT_OF_MEMORY
            torch.cuda.empty_cache()
        else:
            score.correct += correct
            score.answers += answers
            score.sequences += count
        yield


def validate(model: SequenceModel, task: Task, recipe: Recipe) -> float:
    """The worst accuracy over the validation lengths, in percent."""
    accuracies = []
    for seqlen in recipe.validation_lengths:
        score = Score()
        for _ in score_sequences(model, task, recipe, seqlen, VALIDATION, score):
            pass
        accuracies.append(score.accuracy if score.error is None else 0.0)
    return min(accuracies)


@torch.no_grad()
def _test_part(model: SequenceModel, task: Task, draws: Draws, seqlen: int) -> tuple[int, int]:
    tokens, targets = (tensor.flatten(0, 1) for tensor in task.make(draws, 1, seqlen))
    logits = answer_logits_in_chunks(model, tokens, task.answers, CHUNK)
    return int((logits.argmax(-1) == targets).sum()), targets.numel()
