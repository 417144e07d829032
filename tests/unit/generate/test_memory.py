from __future__ import annotations

import pytest
import torch

from mambakit.errors import ArgumentError
from mambakit.generate import memory
from mambakit.generate.memory import free_memory, prepare, slot_bytes

CPU = torch.device("cpu")


def made(model, slots: int, device: torch.device = CPU):
    """What reads prompts, and the decoder."""
    return prepare(model, slots, 8, device, steps=True, prompts=True)


def test_bytes_of_a_slot(small):
    assert slot_bytes(small) == 2 * 32 * (16 * 4 + 3 * 4) + 50


def test_the_number_of_slots_that_fit_is_named(small, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10 * slot_bytes(small) + 1)
    assert made(small, 10)[1].slots.size == 10
    with pytest.raises(
        ArgumentError, match="slots: got 11, but the memory of cpu is enough for 10;"
    ):
        made(small, 11)


def test_a_system_that_does_not_tell_is_believed(small, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert made(small, 3)[1].slots.size == 3


def test_a_gpu_is_tried_until_it_fits(small, monkeypatch):
    tried = []

    def attempt(model, slots, *_):
        tried.append(slots)
        if slots > 3:
            raise torch.OutOfMemoryError
        return "both"

    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    monkeypatch.setattr(memory, "_tried", attempt)
    with pytest.raises(
        ArgumentError, match="slots: got 12, but the memory of cuda is enough for 3;"
    ):
        made(small, 12, torch.device("cuda"))
    assert tried == [12, 6, 3]
    assert made(small, 3, torch.device("cuda")) == "both"


def test_memory_of_this_machine():
    free = free_memory(CPU)
    assert free is None or free > 2**28
    assert free_memory(torch.device("meta")) is None


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("steps", [False, True])
def test_graphs_of_steps_and_of_prompts(small, monkeypatch, steps, prompts, batch_invariant):
    captured = []

    class Graphs:
        def __init__(self, model, chunk):
            captured.append(chunk)
            self.read = "by graphs"

    def decoder(model, slots, graphs, batch_invariant):
        captured.append((graphs, batch_invariant))
        return "decoder"

    monkeypatch.setattr(memory, "PromptGraphs", Graphs)
    monkeypatch.setattr(memory, "Decoder", decoder)
    read, found = memory._tried(small, 3, 8, CPU, steps, prompts, batch_invariant)
    assert found == "decoder"
    assert captured == [*([8] if prompts else []), (steps, batch_invariant)]
    assert (read == "by graphs") == prompts
