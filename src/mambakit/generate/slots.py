"""Memory for the sequences that are being continued, taken once: a row each."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.generate.sampling import SamplingRows
from mambakit.generate.states import States
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.state import ModelState


class Slots:
    """States, last tokens and sampling options of up to `size` sequences.

    The taken rows are always the first, so that a batch is a slice of each tensor: no step gathers
    states. A sequence that ends gives its row to the last one, the only one that is copied.

    Args:
        model: Whose states they are.
        size: Number of rows.

    Attributes:
        taken: How many rows are taken.
        states: What each sequence remembers.
        tokens: What each sequence reads next, (size,), int64.
        sampling: Options and random numbers of each sequence.
        seen: Ids that each sequence holds, (size, V), bool; kept where the repetition penalty is on.
    """

    def __init__(self, model: MambaLanguageModel, size: int) -> None:
        self.size, self.taken = size, 0
        self.states = States.empty(model, size)
        device = self.states.view(1).layers[0].ssm_state.device
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.sampling = SamplingRows(
            torch.ones(size, 4, device=device),
            torch.ones(size, 3, dtype=torch.int64, device=device),
        )
        vocab_size = model.config.vocab_size
        self.seen = torch.zeros(size, vocab_size, dtype=torch.bool, device=device)

    def state(self, count: int) -> ModelState:
        """The states of the first `count` rows, as views."""
        return self.states.view(count)

    def join(self, state: ModelState, sampling: SamplingRows, seen: Tensor | None) -> int:
        """Take the next row for a sequence; return its number.

        Args:
            state: Of the one sequence; copied.
            sampling: Its row.
            seen: Ids of its prompt, int64, if the repetition penalty is on.
        """
        row = self.taken
        assert row < self.size
        self.states.put(row, state)
        for whole, one in zip(self.sampling, sampling, strict=True):
            whole[row : row + 1].copy_(one, non_blocking=True)
        if seen is not None:
            self.seen[row] = False
            self.seen[row].index_fill_(0, seen, True)
        self.taken += 1
        return row

    def leave(self, row: int) -> None:
        """Give a row back; the last one that is taken moves into it."""
        self.taken -= 1
        if row == self.taken:
            return
        self.states.move(self.taken, row)
        for rows in (self.tokens, *self.sampling, self.seen):
            rows[row] = rows[self.taken]
