"""A state is a value: read a prefix once, save the state, and branch from it at will."""

from __future__ import annotations

from pathlib import Path

import torch
from quick_start import train, zen_of_python
from safetensors.torch import load_file, save_file

from mambakit import MambaLanguageModel
from mambakit.models import ModelState
from mambakit.nn import MixerState


def continue_greedily(model: MambaLanguageModel, state: ModelState, text: str, count: int) -> str:
    """Read `text` from `state` on, then write `count` bytes. `state` stays as it is."""
    logits, state = model.prefill(torch.tensor([list(text.encode())]), state)
    written = []
    for _ in range(count):
        token = logits.argmax(-1)
        written.append(int(token))
        logits = model.step(token, state)  # Changes the state in place.
    return text + bytes(written).decode(errors="replace")


def save_state(state: ModelState, path: Path) -> None:
    tensors = {}
    for index, layer in enumerate(state.layers):
        tensors[f"{index}.conv"], tensors[f"{index}.ssm"] = layer.conv_state, layer.ssm_state
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_state(path: Path) -> ModelState:
    tensors = load_file(path)
    layers = range(len(tensors) // 2)
    return ModelState([MixerState(tensors[f"{i}.conv"], tensors[f"{i}.ssm"]) for i in layers])


def main() -> None:
    model = train(zen_of_python())
    prefix = "\n".join(zen_of_python().splitlines()[:5]) + "\n"
    _, state = model.prefill(torch.tensor([list(prefix.encode())]))

    save_state(state, Path("state.safetensors"))
    restored = load_state(Path("state.safetensors"))
    size = Path("state.safetensors").stat().st_size
    print(f"\n{len(prefix)} bytes are read; their state takes {size:,} bytes, as any prefix would.")

    for opening in ("Complex is", "Readability"):
        print(continue_greedily(model, restored, opening, 40).splitlines()[0])


if __name__ == "__main__":
    main()
