"""How one model of an experiment is trained and tested: a frozen dataclass, recorded as TOML. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from mambakit.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model's training and test, complete: the same recipe gives the same data and the same course.

    Adam with its default betas, no weight decay, no clipping, constant learning rate, loss on the answers alone.
    Intervals are multiples of one another, so that a run that goes on does what it would have done.

    Raises:
        ConfigError: A field has a value outside its range.
    """

    seqlen: int
    """Length of the training sequences, as the task counts it."""
    batch_size: int
    """Sequences of a step."""
    lr: float
    """Constant learning rate."""
    steps: int
    """Most optimizer steps."""
    precision: str = "float32"
    """float32, or bfloat16: matrix products and activations in that (autocast); weights and optimizer stay float32."""
    steps_per_call: int = 8
    """Steps done at once: one CUDA graph, and one making of data, for all of them."""
    log_every: int = 64
    """Steps between two readings of the loss, for which a GPU has to be waited for."""
    validate_every: int
    """Steps between two validations, at which a checkpoint is saved too."""
    validation_lengths: tuple[int, ...]
    """Lengths of the validation sequences; the worst accuracy counts."""
    validation_sequences: int
    """Validation sequences of each length; other ones than those of the test."""
    target: float
    """Accuracy in percent that counts as reproduced."""
    hold: int
    """Training ends early when this many validations in a row reach the target; 0: never."""
    test_lengths: tuple[int, ...]
    """Lengths of the test sequences: the columns of the table."""
    test_sequences: int
    """Test sequences of each length."""
    tokens_at_once: int = 2**20
    """Most tokens that validation and test work on at once."""
    seed: int = 0
    """Seed of the initial weights and of all data."""

    def __post_init__(self) -> None:
        for name in (
            "seqlen",
            "batch_size",
            "steps",
            "steps_per_call",
            "log_every",
            "validate_every",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("validation_sequences", "test_sequences", "tokens_at_once"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("lr", 0 < self.lr < 10, "between 0 and 10")
        precisions = ("float32", "bfloat16")
        self._require("precision", self.precision in precisions, "float32 or bfloat16")
        self._require("hold", self.hold >= 0, "at least 0")
        for small, large in (
            ("steps_per_call", "log_every"),
            ("log_every", "validate_every"),
            ("log_every", "steps"),
        ):
            factor = getattr(self, small)
            self._require(
                large, getattr(self, large) % factor == 0, f"a multiple of {small} = {factor}"
            )
        for name in ("validation_lengths", "test_lengths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            self._require(name, len(getattr(self, name)) > 0, "a list of lengths")

    def _require(self, name: str, is_valid: bool, wanted: str) -> None:
        if not is_valid:
            raise ConfigError(f"recipe: {name} is {getattr(self, name)!r}, not {wanted}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON and TOML can hold."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
