import pytest
import torch

from mambakit.generate.states import States
from mambakit.models import MambaConfig, MambaLanguageModel, ModelState
from mambakit.ops.deferred_states import REPEATS, WRITES


@pytest.fixture
def model() -> MambaLanguageModel:
    return MambaLanguageModel(MambaConfig(d_model=16, n_layer=3, vocab_size=8))


def read(model: MambaLanguageModel, *tokens: int) -> ModelState:
    return model.prefill(torch.tensor([tokens]))[1]


def assert_equal(found: ModelState, expected: ModelState) -> None:
    for ours, truth in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(ours.conv_state, truth.conv_state)
        assert torch.equal(ours.ssm_state, truth.ssm_state)


def test_rows(model: MambaLanguageModel) -> None:
    states = States.empty(model, 3)
    assert_equal(states.view(2), model.initial_state(2))
    first, second = read(model, 1, 2), read(model, 3)
    states.put(0, first)
    states.put(1, second)
    assert_equal(states.view(2), ModelState.cat([first, second]))
    assert_equal(states.view(3), ModelState.cat([first, second, model.initial_state(1)]))
    states.move(1, 2)
    states.put(1, None)
    assert_equal(states.view(3), ModelState.cat([first, model.initial_state(1), second]))


def test_a_view_is_in_place_and_a_copy_is_not(model: MambaLanguageModel) -> None:
    state = read(model, 1, 2, 3)
    states = States.joined(state)
    copy = states.clone()
    states.view(1).layers[0].ssm_state.zero_()
    states.view(1).layers[2].conv_state.zero_()
    assert_equal(copy.view(1), state)
    assert not torch.equal(states.view(1).layers[0].ssm_state, state.layers[0].ssm_state)
    assert states.view(1) is states.view(1)


def test_deferred_states_follow_their_rows(model: MambaLanguageModel) -> None:
    states = States.empty(model, 4)
    deferred = states.defer()
    assert states.defer() is deferred
    deferred.turns.fill_(REPEATS)
    states.put(2, read(model, 1))
    states.put(3, None)
    assert deferred.turns.tolist() == [REPEATS, REPEATS, WRITES, WRITES]
    deferred.inputs[:, :, 1] = 1
    states.move(1, 3)
    assert deferred.turns.tolist() == [REPEATS, REPEATS, WRITES, REPEATS]
    assert (deferred.inputs[:, :, 3] == 1).all()
