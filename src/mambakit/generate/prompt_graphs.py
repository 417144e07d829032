"""Chunks of a prompt as CUDA graphs: the host launches at once what takes it longer than the GPU, one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.generate.graphs import beside, capture
from mambakit.generate.states import States
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.state import ModelState

SMALLEST = 64
"""Tokens of the smallest graph. Fewer take a GPU as long: it reads all weights for them."""


class PromptGraphs:
    """Reads chunks of one prompt after another.

    There is a graph for chunks of 64, 128, ... tokens, which reads shorter ones too, padded; and one for a
    whole chunk, which has no padding. What a chunk gives depends on nothing but the chunk and the state before it.

    Args:
        model: Reads them, on a GPU. Its weights must not be replaced.
        chunk: Most tokens at once.
    """

    def __init__(self, model: MambaLanguageModel, chunk: int) -> None:
        self._model, self._chunk = model, chunk
        self._before = States.empty(model, 1)
        device = self._before.view(1).layers[0].ssm_state.device
        self._tokens = torch.zeros(1, chunk, dtype=torch.int64, device=device)
        self._lengths = torch.ones(1, dtype=torch.int64, device=device)
        self._graphs = {}
        pool = torch.cuda.graph_pool_handle()
        with beside():
            for size in sizes(chunk):
                self._graphs[size] = capture(lambda: self._read(size, self._lengths), pool)  # noqa: B023
            self._whole = capture(lambda: self._read(chunk, None), pool)

    def read(self, tokens: Tensor, state: ModelState | None) -> tuple[Tensor, ModelState]:
        """Read a chunk.

        Args:
            tokens: (1, L), with L at most `chunk`.
            state: What came before; it stays as it is. None: nothing.

        Returns:
            Logits after it, (1, V), and the state.
        """
        length = tokens.shape[1]
        self._before.put(0, state)
        self._tokens[:, :length].copy_(tokens, non_blocking=True)
        if length == self._chunk:
            graph, (logits, after) = self._whole
        else:
            self._lengths.fill_(length)
            graph, (logits, after) = self._graphs[
                next(size for size in self._graphs if size >= length)
            ]
        graph.replay()
        return logits.clone(), after.clone().view(1)

    @torch.no_grad()
    def _read(self, size: int, lengths: Tensor | None) -> tuple[Tensor, States]:
        tokens = self._tokens[:, :size]
        logits, state = self._model.prefill(
            tokens, self._before.view(1), lengths=lengths, chunk=size
        )
        return logits, States.joined(state)


def sizes(chunk: int) -> list[int]:
    """Sizes of the graphs: powers of two from `SMALLEST` on, and `chunk` itself.

    Example:
        >>> sizes(300), sizes(16)
        ([64, 128, 256, 300], [16])
    """
    found = []
    size = SMALLEST
    while size < chunk:
        found.append(size)
        size *= 2
    return [*found, chunk]
