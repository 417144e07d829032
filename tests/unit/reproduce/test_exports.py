from __future__ import annotations

import pytest

from mambakit import reproduce
from mambakit.errors import ArgumentError


def test_exports_exist():
    for name in reproduce.__all__:
        assert getattr(reproduce, name) is not None
        assert name in dir(reproduce)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        reproduce.nothing  # noqa: B018


def test_experiments_are_found_by_name():
    assert reproduce.find_experiment("induction-heads").name == "induction-heads"
    with pytest.raises(ArgumentError, match="did you mean 'selective-copying'"):
        reproduce.find_experiment("selective-coping")
    with pytest.raises(ArgumentError, match="got 'x'; there are: selective-copying, induction-"):
        reproduce.find_experiment("x")
