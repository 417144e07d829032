"""Whether as many slots as were asked for fit, and if not, how many do."""

from __future__ import annotations

import os

import torch

from mambakit.errors import ArgumentError
from mambakit.generate.decoding import Decoder
from mambakit.generate.prefix import state_bytes
from mambakit.generate.prompt_graphs import PromptGraphs
from mambakit.generate.reading import ReadChunk, chunk_reader
from mambakit.models.language_model import MambaLanguageModel


def prepare(
    model: MambaLanguageModel,
    slots: int,
    chunk: int,
    device: torch.device,
    *,
    steps: bool,
    prompts: bool,
    batch_invariant: bool = False,
) -> tuple[ReadChunk, Decoder]:
    """What reads chunks of prompts, and a decoder of so many slots; on a GPU after running all they will run.

    Args:
        model: For both.
        slots: Of the decoder.
        chunk: Most tokens read at once.
        device: Where the model is.
        steps: Whether steps are CUDA graphs, on a GPU.
        prompts: Whether the reading of chunks is.
        batch_invariant: Of the decoder.

    Raises:
        ArgumentError: They do not fit into the memory.
    """
    needed, free = slot_bytes(model), free_memory(device)
    if free is not None and slots * needed > free:
        raise _refusal(slots, free // needed, device)
    if device.type != "cuda":
        return chunk_reader(model, device), Decoder(model, slots, graphs=False)
    fits = slots
    while fits:
        try:
            prepared = _tried(model, fits, chunk, device, steps, prompts, batch_invariant)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            fits //= 2
            continue
        if fits == slots:
            return prepared
        break
    raise _refusal(slots, fits, device)


def slot_bytes(model: MambaLanguageModel) -> int:
    """Bytes that a slot takes at least: a state, and a flag for each id of the vocabulary.

    Where steps defer states (`DeferredStates`) it is a twentieth more, which only a trial finds out.
    """
    return state_bytes(model.initial_state(1)) + model.config.vocab_size


def free_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has free, or that a computer has at all; None if the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _tried(
    model: MambaLanguageModel,
    slots: int,
    chunk: int,
    device: torch.device,
    steps: bool,
    prompts: bool,
    batch_invariant: bool,
) -> tuple[ReadChunk, Decoder]:
    if prompts:
        read: ReadChunk = PromptGraphs(model, chunk).read
    else:
        read = chunk_reader(model, device)
        read(torch.zeros(1, chunk, dtype=torch.int64), None)
    return read, Decoder(model, slots, graphs=steps, batch_invariant=batch_invariant)


def _refusal(slots: int, fits: int, device: torch.device) -> ArgumentError:
    return ArgumentError(
        f"slots: got {slots}, but the memory of {device} is enough for {fits}; "
        "take no more than that, or a smaller model or dtype"
    )
