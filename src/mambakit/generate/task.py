"""A request under way: how far it is, and what it has given out."""

from __future__ import annotations

import queue
import secrets
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mambakit.errors import ArgumentError
from mambakit.generate.request import Completion, Output, Request
from mambakit.generate.sampling import Method, SamplingRows
from mambakit.generate.stopping import TextStream
from mambakit.generate.tokenizer import Tokenizer
from mambakit.models.state import ModelState
from mambakit.ops.likeliest import NOT_FINITE


class Task:
    """Progress of a request. All but `cancelled` belong to the thread that steps the engine.

    Args:
        request: What is asked for.
        prompt: Its ids.
        vocab_size: Of the model.
        tokenizer: Turns tokens into text. Default: none.

    Attributes:
        read: Tokens of the prompt read so far.
        state: After them; None: nothing was read.
        row: In the slots, once the prompt is read.
        launched: Tokens that the device has chosen or is about to.
        keys: Of the beginnings of the prompt in the prefix cache, one a whole chunk.
        outputs: What comes, then None.
    """

    def __init__(
        self, request: Request, prompt: list[int], vocab_size: int, tokenizer: Tokenizer | None
    ) -> None:
        self.request = request
        self.method = Method.of(request.options)
        self.prompt = torch.tensor([prompt])
        self.keys: Sequence[bytes] = ()
        self.read = self.reused = self.launched = 0
        self.state: ModelState | None = None
        self.row = -1
        before = 0
        if request.prefix is not None:
            before, self.state = request.prefix.length, request.prefix.state
        seed = secrets.randbits(48) if request.seed is None else request.seed
        position = before + len(prompt)
        self.sampling = SamplingRows.of(request.options, vocab_size, seed, position)
        self.cancelled = False
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None
        self.error: BaseException | None = None
        self.outputs: queue.SimpleQueue[Output | None] = queue.SimpleQueue()
        self._given: list[Output] = []
        self._tokens = 0
        self._tokenizer = tokenizer
        self._text = TextStream(request.stop)
        stop_ids = request.stop_ids
        if stop_ids is None:
            stop_ids = () if tokenizer is None else (tokenizer.eos_id,)
        self._stop_ids = frozenset(stop_ids)

    @property
    def unread(self) -> int:
        """Tokens of the prompt still to read."""
        return self.prompt.shape[1] - self.read

    @property
    def seen(self) -> Tensor | None:
        """Ids that the repetition penalty applies to, if it is on."""
        if self.request.options.repetition_penalty == 1:
            return None
        prefix = self.request.prefix
        before = [] if prefix is None else [prefix.tokens]
        return torch.cat([*before, self.prompt[0]])

    def chunk(self, size: int) -> int:
        """Tokens to read next: up to the next multiple of `size`, or the end of the prompt.

        Counted with what was read before, so that it depends on nothing else that goes on.
        """
        before = 0 if self.request.prefix is None else self.request.prefix.length
        to_multiple = size - (before + self.read) % size
        return min(to_multiple, self.unread)

    def take(
        self, token: int, logprob: float | None, likeliest: tuple[tuple[int, float], ...]
    ) -> None:
        """Give out the next token, unless it ends the request or the request has ended already."""
        if self.finish_reason is not None:
            return
        if self.cancelled:
            self.finish("cancelled")
            return
        if token == NOT_FINITE:
            self.finish("cancelled", ArgumentError(_NOT_FINITE_LOGITS))
            return
        if token in self._stop_ids:
            self.finish("stop")
            return
        text = ""
        if self._tokenizer is not None:
            text = self._text.feed(self._tokenizer.decode_bytes([token]))
        self._give(Output(token=token, text=text, logprob=logprob, likeliest=likeliest))
        self._tokens += 1
        if self._text.stopped:
            self.finish("stop")
        elif self._tokens == self.request.max_tokens:
            self.finish("length")

    def finish(
        self, reason: Literal["stop", "length", "cancelled"], error: BaseException | None = None
    ) -> None:
        """End the request; what was held back of its text comes as a last output."""
        if self.finish_reason is not None:
            return
        self.finish_reason, self.error = reason, error
        self.state = None
        if rest := self._text.finish():
            self._give(Output(token=None, text=rest))
        self.outputs.put(None)

    def completion(self) -> Completion:
        """All that was given out, once it has ended."""
        assert self.finish_reason is not None
        return Completion(
            outputs=self._given, finish_reason=self.finish_reason, reused_tokens=self.reused
        )

    def _give(self, output: Output) -> None:
        self._given.append(output)
        self.outputs.put(output)


_NOT_FINITE_LOGITS = (
    "logits: got NaN or infinite numbers, wanted finite ones; "
    "the weights are damaged, or overflow in their dtype (try float32)"
)
