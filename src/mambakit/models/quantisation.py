"""Weight-only quantisation of a model: its matrices become integers, all else stays as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mambakit.errors import ArgumentError, ConfigError
from mambakit.nn.linear import DtProjection, Linear
from mambakit.nn.quantised_linear import QuantisedDtProjection, QuantisedEmbedding, QuantisedLinear
from mambakit.ops.quantisation import BITS, GROUP_SIZES, quantise_weight

if TYPE_CHECKING:
    from mambakit.models.language_model import MambaLanguageModel

STEERING = ("x_proj", "dt_proj")
"""They make dt, B and C, and hold one weight in thirty: eight bits, whatever the others have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How the matrices of a model are stored.

    Raises:
        ConfigError: A field has a value outside its range.
    """

    bits: int = 8
    """Bits of a weight: 8 or 4."""
    group_size: int = 64
    """Neighbouring weights of a row that share a scale: 32, 64 or 128."""

    def __post_init__(self) -> None:
        for name, allowed in (("bits", BITS), ("group_size", GROUP_SIZES)):
            value = getattr(self, name)
            if isinstance(value, bool) or value not in allowed:
                raise ConfigError(f"quantisation: {name} is {value!r}, not one of {allowed}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quantisation:
        """Make one from all of its fields.

        Raises:
            ConfigError: A field is missing or unknown, or has a value outside its range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            got, wanted = sorted(map(str, values)), sorted(names)
            raise ConfigError(f"quantisation: got the fields {got}, wanted {wanted}")
        return cls(**values)


def quantise(
    model: MambaLanguageModel,
    quantisation: Quantisation,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Quantise a model in place: in_proj, x_proj, dt_proj, out_proj, embedding and head.

    A_log, D, the bias of dt, convolutions and norms stay as they are. A tied head stays tied.

    Args:
        model: Float32, of plain layers (no adapters).
        quantisation: How.
        progress: Called with the matrices done and their number after each one.

    Raises:
        ArgumentError: The model is quantised already, is not float32, or has other layers.
    """
    if model.quantisation is not None:
        bits = model.quantisation.bits
        raise ArgumentError(
            f"model: is quantised to {bits} bits already; quantise the float model it came from"
        )
    places = [*_places(model)]
    for name, _, _, layer in places:
        if type(layer) not in (Linear, DtProjection, nn.Embedding):
            raise ArgumentError(
                f"model: {name} is a {type(layer).__name__}, not a plain layer; merge adapters first"
            )
        if layer.weight.dtype != torch.float32:
            raise ArgumentError(
                f"model: {name} is {layer.weight.dtype}, wanted torch.float32; call .float() first"
            )
    for done, (_, parent, child, layer) in enumerate(places, start=1):
        bits = 8 if child in STEERING else quantisation.bits
        setattr(parent, child, _quantised(layer, bits, quantisation.group_size))
        if progress is not None:
            progress(done, len(places))
    model.quantisation = quantisation
    model.tie_weights()


def _places(model: MambaLanguageModel) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Every matrix of the model: its name, the module it is in, its name there, the layer."""
    yield "backbone.embedding", model.backbone, "embedding", model.backbone.embedding
    for index, block in enumerate(model.backbone.blocks()):
        for child in ("in_proj", *STEERING, "out_proj"):
            layer = getattr(block.mixer, child, None)
            if layer is not None:
                yield f"backbone.layers.{index}.mixer.{child}", block.mixer, child, layer
    if not model.config.tie_embeddings:
        yield "lm_head", model, "lm_head", model.lm_head


def _quantised(layer: Any, bits: int, group_size: int) -> nn.Module:
    weight = quantise_weight(layer.weight, bits, group_size)
    if isinstance(layer, nn.Embedding):
        return QuantisedEmbedding(QuantisedLinear(weight))
    kind = QuantisedDtProjection if isinstance(layer, DtProjection) else QuantisedLinear
    return kind(weight, layer.bias)
