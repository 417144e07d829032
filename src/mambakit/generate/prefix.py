"""A beginning of prompts that has been read: kept, saved, loaded and continued as often as one likes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambakit.errors import ArgumentError, CheckpointError
from mambakit.files import atomic_write
from mambakit.generate.request import token_ids
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.state import ModelState
from mambakit.nn.state import MixerState

FORMAT = "mambakit prefix"
VERSION = 1
_SMALL = 2**14


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens, and the model's state after them. The state's size does not grow with their number.

    Nothing changes it: requests that continue a prefix copy its state first.

    Attributes:
        tokens: Everything that was read, (L,), int32, on the CPU.
        state: After it, of one sequence.
        fingerprint: Of the model; see `fingerprint`.

    Example:
        >>> from mambakit import MambaConfig, MambaLanguageModel
        >>> model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=8))
        >>> prefix = Prefix.read(model, [1, 2, 3])
        >>> longer = Prefix.read(model, [4], after=prefix)
        >>> longer.length, longer.nbytes - prefix.nbytes
        (4, 4)
    """

    tokens: Tensor
    state: ModelState
    fingerprint: str

    @staticmethod
    def read(
        model: MambaLanguageModel, prompt: Any, *, after: Prefix | None = None, chunk: int = 2048
    ) -> Prefix:
        """Read a prompt.

        Args:
            model: Reads it.
            prompt: Token ids, at least one.
            after: What came before; it stays as it is. Default: nothing.
            chunk: Most tokens read at once, which bounds the memory.

        Raises:
            ArgumentError: An argument is out of range, or `after` is of another model.
        """
        ids = token_ids("prompt", prompt, model.config.vocab_size)
        mark = fingerprint(model)
        if after is not None:
            after.check_model(mark)
        state = None if after is None else after.state
        device = model.initial_state(1).layers[0].ssm_state.device
        _, state = model.prefill(torch.tensor([ids], device=device), state, chunk=chunk)
        tokens = torch.tensor(ids, dtype=torch.int32)
        return Prefix(tokens if after is None else torch.cat([after.tokens, tokens]), state, mark)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.tokens.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the state and the tokens."""
        return state_bytes(self.state) + self.tokens.nbytes

    def check_model(self, mark: str) -> None:
        """Raise ArgumentError unless the model with this fingerprint has read it."""
        if mark != self.fingerprint:
            raise ArgumentError(
                "prefix: was read by another model, or by other weights; read its tokens again"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file in the format of safetensors, in one step.

        Raises:
            MambakitError: The file cannot be written, or the disk is full.
        """
        tensors = {"tokens": self.tokens}
        for index, layer in enumerate(self.state.layers):
            for name, tensor in _parts(layer).items():
                real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                tensors[f"layers.{index}.{name}"] = real.cpu().contiguous()
        metadata = {"format": FORMAT, "version": str(VERSION), "fingerprint": self.fingerprint}
        with atomic_write(path) as partial:
            save_file(tensors, partial, metadata=metadata)

    @staticmethod
    def load(path: str | os.PathLike[str], model: MambaLanguageModel) -> Prefix:
        """Read what `save` wrote, to the device of the model.

        Raises:
            CheckpointError: There is no such file, it is damaged, from a newer version, or of
                another model.
        """
        tensors, metadata = _read(path)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a saved prefix; give a file of Prefix.save")
        if metadata.get("version") != str(VERSION):
            raise CheckpointError(
                f"{path} has version {metadata.get('version')}, wanted {VERSION}; upgrade mambakit"
            )
        mark = fingerprint(model)
        if metadata.get("fingerprint") != mark:
            raise CheckpointError(
                f"{path} was read by another model, or by other weights; "
                "load that model, or read the tokens again"
            )
        layers = [
            MixerState(**{name: _like(path, tensors.get(f"layers.{i}.{name}"), wanted)
                          for name, wanted in _parts(layer).items()})
            for i, layer in enumerate(model.initial_state(1).layers)
        ]  # fmt: skip
        if "tokens" not in tensors:
            raise CheckpointError(f"{path} is damaged: it has no tokens; save it again")
        return Prefix(tensors["tokens"], ModelState(layers), mark)


def fingerprint(model: MambaLanguageModel) -> str:
    """What tells models apart: a digest of the config and of all small tensors among the weights.

    Training changes them all, and they are read in no time.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        if tensor.numel() <= _SMALL:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def state_bytes(state: ModelState) -> int:
    """Bytes of a state."""
    return sum(tensor.nbytes for layer in state.layers for tensor in _parts(layer).values())


def _parts(layer: MixerState) -> dict[str, Tensor]:
    return {"conv_state": layer.conv_state, "ssm_state": layer.ssm_state}


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give a file of Prefix.save") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut off ({error}); copy or save it again"
        ) from error


def _like(path: str | os.PathLike[str], tensor: Tensor | None, wanted: Tensor) -> Tensor:
    """A tensor of the file as the model has it."""
    if tensor is not None and wanted.is_complex():
        tensor = torch.view_as_complex(tensor)
    if tensor is None or tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
        raise CheckpointError(f"{path} is damaged: a state is missing or has another shape")
    return tensor.to(wanted.device)
