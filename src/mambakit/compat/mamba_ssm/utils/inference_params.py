"""`InferenceParams`; `mamba_ssm.utils.generation` exports it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class InferenceParams:
    """What a model keeps between calls.

    Attributes:
        max_seqlen: Without effect: states do not grow.
        max_batch_size: Without effect: states are made for the batch that comes.
        seqlen_offset: Number of positions so far; the caller counts. At 0 states start afresh.
        batch_size_offset: Without effect.
        key_value_memory_dict: States of each layer, by its number.
        lengths_per_sample: Without effect.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin another sequence."""
        self.max_seqlen, self.max_batch_size = max_seqlen, max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
