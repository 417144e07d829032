"""States that are written every second step: whose turn it is, and how they are settled."""

from __future__ import annotations

import pytest
import torch
from zero_layers import zero_layer

from mambakit.ops import selective_scan_step
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


def test_settling() -> None:
    torch.manual_seed(0)
    wide = DeferredStates.empty((LAYERS, ROWS + 2, CHANNELS, STATES), like=torch.empty(0))
    deferred = wide.view(ROWS)
    layers, expected = [], []
    is_behind = torch.arange(ROWS) % 3 == 1
    deferred.turns.copy_(torch.where(is_behind, REPEATS, WRITES))
    for (dt, x), B in zip(deferred.inputs, deferred.B, strict=True):
        state, A_log = torch.randn(ROWS, CHANNELS, STATES), torch.randn(CHANNELS, STATES)
        dt.copy_(torch.rand_like(dt))
        x.normal_()
        B.normal_()
        after = state.clone()
        selective_scan_step(after, x, dt, -A_log.exp(), B, B)
        expected.append(torch.where(is_behind[:, None, None], after, state))
        layer = zero_layer(torch.float32, CHANNELS // 2, ROWS, states=STATES)
        layers.append(layer._replace(ssm_state=state, A_log=A_log))
    deferred.settle(layers)
    for layer, truth in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.ssm_state, truth)
        assert torch.equal(layer.ssm_state[~is_behind], truth[~is_behind])
    assert deferred.turns.tolist() == [KEEPS, KEEPS, WRITES, WRITES, KEEPS, KEEPS, WRITES]
