"""States that are written every second step: whose turn it is."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops.deferred_states import KEEPS, REPEATS, WRITES, DeferredStates

LAYERS, ROWS, CHANNELS, STATES = 2, 7, 6, 4


@pytest.fixture
def deferred() -> DeferredStates:
    return DeferredStates.empty((LAYERS, ROWS, CHANNELS, STATES), like=torch.empty(0).bfloat16())


def test_half_of_the_rows_are_written_in_the_first_step(deferred: DeferredStates) -> None:
    assert deferred.turns.tolist() == [KEEPS, KEEPS, WRITES, WRITES, KEEPS, KEEPS, WRITES]
    assert deferred.turns.dtype == torch.int32
    assert {deferred.inputs.dtype, deferred.B.dtype} == {torch.bfloat16}


def test_rows_that_come_and_go(deferred: DeferredStates) -> None:
    deferred.turns.fill_(REPEATS)
    deferred.put(0)
    deferred.view(4).put(3)
    assert deferred.turns.tolist() == [KEEPS, REPEATS, REPEATS, WRITES, *[REPEATS] * 3]
    deferred.inputs[:, :, 5] = 5
    deferred.B[:, 5] = 6
    deferred.move(5, 0)
    assert deferred.turns[0] == REPEATS
    assert (deferred.inputs[:, :, 0] == 5).all()
    assert (deferred.B[:, 0] == 6).all()
    assert (deferred.inputs[:, :, 1:5] == 0).all()


def test_rows_that_have_been_written(deferred: DeferredStates) -> None:
    deferred.turns.fill_(REPEATS)
    deferred.view(5).reset()
    assert deferred.turns.tolist() == [KEEPS, KEEPS, WRITES, WRITES, KEEPS, REPEATS, REPEATS]
    assert deferred.view(5).stored_rows == ROWS
