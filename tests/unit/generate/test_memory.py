from __future__ import annotations

import pytest
import torch

from mambakit.errors import ArgumentError
from mambakit.generate import memory
from mambakit.generate.memory import free_memory, prepare, slot_bytes

CPU = torch.device("cpu")


def test_bytes_of_a_slot(small):
    assert slot_bytes(small) == 2 * 32 * (16 * 4 + 3 * 4) + 50


def test_the_number_of_slots_that_fit_is_named(small, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10 * slot_bytes(small) + 1)
    assert prepare(small, 10, 8, True, CPU)[1].slots.size == 10
    with pytest.raises(
        ArgumentError, match="slots: got 11, but the memory of cpu is enough for 10;"
    ):
        prepare(small, 11, 8, True, CPU)


def test_a_system_that_does_not_tell_is_believed(small, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert prepare(small, 3, 8, True, CPU)[1].slots.size == 3


def test_a_gpu_is_tried_until_it_fits(small, monkeypatch):
    tried = []

    def attempt(model, slots, chunk, cuda_graphs, device):
        tried.append(slots)
        if slots > 3:
            raise torch.OutOfMemoryError
        return "decoder"

    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    monkeypatch.setattr(memory, "_tried", attempt)
    with pytest.raises(
        ArgumentError, match="slots: got 12, but the memory of cuda is enough for 3;"
    ):
        prepare(small, 12, 8, True, torch.device("cuda"))
    assert tried == [12, 6, 3]
    assert prepare(small, 3, 8, True, torch.device("cuda")) == "decoder"


def test_memory_of_this_machine():
    free = free_memory(CPU)
    assert free is None or free > 2**28
    assert free_memory(torch.device("meta")) is None
