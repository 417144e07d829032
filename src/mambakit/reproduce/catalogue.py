"""The experiments there are, by name."""

from __future__ import annotations

import difflib

from mambakit.errors import ArgumentError
from mambakit.reproduce import induction_heads, selective_copying
from mambakit.reproduce.experiment import Experiment

EXPERIMENTS = {
    found.name: found for found in (selective_copying.EXPERIMENT, induction_heads.EXPERIMENT)
}


def find_experiment(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        ArgumentError: There is none.
    """
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(EXPERIMENTS)}"
        raise ArgumentError(f"experiment: got {name!r}; {hint}")
    return EXPERIMENTS[name]
