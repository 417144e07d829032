"""How tokens are chosen from the model's logits. Imports no torch."""

from __future__ import annotations

import dataclasses
import math

from mambakit.errors import ArgumentError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a token is chosen. What is switched on applies in the order of the fields.

    Raises:
        ArgumentError: A field is outside its range.
    """

    repetition_penalty: float = 1.0
    """Logits of ids that occur in the prompt or the continuation are divided by this if positive,
    multiplied if negative (CTRL, arXiv 1909.05858); 1 is off."""
    temperature: float = 1.0
    """Logits are divided by this; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens stay (and ties with the last); None is off."""
    top_p: float = 1.0
    """Only the likeliest tokens stay that together have this probability; 1 is off."""
    min_p: float = 0.0
    """Only tokens with this share of the largest probability stay; 0 is off."""

    def __post_init__(self) -> None:
        penalty, top_k = self.repetition_penalty, self.top_k
        _require("repetition_penalty", penalty, 0 < penalty < math.inf, "a number above 0")
        _require("temperature", self.temperature, 0 <= self.temperature < math.inf, "at least 0")
        _require("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or None")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")


def _require(name: str, value: float | None, is_valid: bool, wanted: str) -> None:
    if not is_valid:
        raise ArgumentError(f"{name}: got {value}, wanted {wanted}")
