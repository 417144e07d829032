"""What an experiment is: a task, models with their recipes, and the paper's numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from mambakit.models.config import MambaConfig
from mambakit.reproduce.attention import AttentionConfig
from mambakit.reproduce.draws import Draws
from mambakit.reproduce.recipe import Recipe


class Examples(NamedTuple):
    """Sequences and what is to be predicted at their ends."""

    tokens: Tensor
    """(K, B, L), int64."""
    targets: Tensor
    """What stands in for the last positions, (K, B, answers), int64."""


class Task(Protocol):
    """Makes sequences whose last `answers` positions are predicted."""

    @property
    def answers(self) -> int:
        """Number of last positions that count."""

    def make(self, draws: Draws, batch: int, seqlen: int) -> Examples:
        """Make `batch` sequences for each step of `draws`, on its device."""

    def kinds(self, tokens: Tensor) -> Mapping[str, Tensor]:
        """What the tokens of one sequence, (L,), are: for each kind its name and a mask, (L,), bool."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model of an experiment."""

    title: str
    """First column of the table."""
    model: MambaConfig | AttentionConfig
    """Its shape."""
    recipe: Recipe
    """How it is trained and tested."""
    paper: Mapping[int, float | None] = dataclasses.field(default_factory=dict)
    """The paper's accuracy in percent, by test length; None where it ran out of memory. What it does not give is left
    out."""

    def to_dict(self) -> dict[str, Any]:
        """All that decides a run, as plain values."""
        return {"recipe": self.recipe.to_dict(), "model": self.model.to_dict()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment of the paper, and a small one that shows the same on a CPU."""

    name: str
    """As `mambakit reproduce` takes it."""
    title: str
    """One line."""
    source: str
    """Where the paper has it."""
    task: Task
    """What is learned."""
    contestants: Mapping[str, Contestant]
    """Models by name, in the order of the table."""
    quick_task: Task
    """What is learned with --quick."""
    quick: Mapping[str, Contestant]
    """The models of --quick."""

    def made_quick(self) -> Experiment:
        """The small experiment in place of the paper's."""
        return dataclasses.replace(self, task=self.quick_task, contestants=self.quick)
