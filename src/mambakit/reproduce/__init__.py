"""The paper's experiments, each reproduced by one command: recipe, task, models, table beside the paper's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mambakit.lazy import attach

if TYPE_CHECKING:
    from mambakit.reproduce.catalogue import find_experiment as find_experiment
    from mambakit.reproduce.draws import Draws as Draws
    from mambakit.reproduce.experiment import Contestant as Contestant
    from mambakit.reproduce.experiment import Experiment as Experiment
    from mambakit.reproduce.induction_heads import InductionHeads as InductionHeads
    from mambakit.reproduce.recipe import Recipe as Recipe
    from mambakit.reproduce.runner import reproduce as reproduce
    from mambakit.reproduce.selective_copying import SelectiveCopying as SelectiveCopying

_EXPORTS = {
    "Contestant": "mambakit.reproduce.experiment",
    "Draws": "mambakit.reproduce.draws",
    "Experiment": "mambakit.reproduce.experiment",
    "InductionHeads": "mambakit.reproduce.induction_heads",
    "Recipe": "mambakit.reproduce.recipe",
    "SelectiveCopying": "mambakit.reproduce.selective_copying",
    "find_experiment": "mambakit.reproduce.catalogue",
    "reproduce": "mambakit.reproduce.runner",
}
__all__ = [
    "Contestant",
    "Draws",
    "Experiment",
    "InductionHeads",
    "Recipe",
    "SelectiveCopying",
    "find_experiment",
    "reproduce",
]

__getattr__, __dir__ = attach(__name__, _EXPORTS)
