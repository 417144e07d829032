from __future__ import annotations

import pytest
import torch

from mambakit.generate import SamplingOptions
from mambakit.generate.decoding import buckets
from mambakit.generate.sampling import SamplingRows
from mambakit.generate.slots import Slots
from mambakit.models import MambaConfig, MambaLanguageModel


def sampling(number: int) -> SamplingRows:
    return SamplingRows.of(SamplingOptions(temperature=number), 50, number, number)


@pytest.fixture(params=["real", "complex", "bfloat16"])
def model(request, small) -> MambaLanguageModel:
    if request.param == "complex":
        return MambaLanguageModel(
            MambaConfig(d_model=16, n_layer=2, vocab_size=50, A_init="s4d-lin")
        )
    if request.param == "bfloat16":
        return MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=50)).bfloat16()
    return small


def test_rows_stay_in_front_and_only_the_last_moves(model):
    slots = Slots(model, 4)
    states = [model.prefill(torch.tensor([[n, n + 1]]))[1] for n in range(4)]
    for number, state in enumerate(states[:3]):
        seen = torch.tensor([number, number, 7]) if number else None
        assert slots.join(state, sampling(number), seen) == number
        slots.tokens[number] = number
    slots.leave(0)
    assert slots.taken == 2
    assert_row(slots, 0, states[2], 2)
    assert_row(slots, 1, states[1], 1)
    slots.leave(1)
    assert slots.join(states[3], sampling(3), torch.tensor([1])) == 1
    assert_row(slots, 0, states[2], 2)
    assert slots.seen[1].nonzero().flatten().tolist() == [1]  # nothing is left of who was there


def assert_row(slots: Slots, row: int, state, number: int) -> None:
    for layer, expected in zip(slots.state(row + 1).layers, state.layers, strict=True):
        assert torch.equal(layer.conv_state[row], expected.conv_state[0])
        assert torch.equal(layer.ssm_state[row], expected.ssm_state[0])
    assert slots.tokens[row] == number
    assert slots.sampling.reals[row, 1] == number
    assert slots.sampling.integers[row, 2] == number
    assert slots.seen[row].nonzero().flatten().tolist() == sorted({number, 7})


def test_a_batch_is_a_view_that_kernels_take_as_it_is(small):
    slots = Slots(small, 5)
    for layer in slots.state(3).layers:
        assert layer.batch_size == 3
        assert layer.ssm_state.is_contiguous()
        assert layer.conv_state.is_contiguous()
        layer.ssm_state[2] = 1
    assert slots.state(3) is slots.state(3)
    assert all(bool((layer.ssm_state[2] == 1).all()) for layer in slots.state(5).layers)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (100, [1, 2, 4, 8, 16, 32, 64, 100])],
)
def test_buckets(size, expected):
    assert buckets(size) == expected
