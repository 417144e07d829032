"""`mamba_ssm.utils.generation`: decoding with the authors' signatures."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mambakit.compat.mamba_ssm.utils.cuda_graphs import (
    DecodingCGCache,
    capture_graph,
    update_graph_cache,
)
from mambakit.compat.mamba_ssm.utils.inference_params import InferenceParams
from mambakit.errors import ArgumentError, ShapeError
from mambakit.generate.sampling import Method, SamplingRows, penalise, probabilities

__all__ = [
    "DecodingCGCache",
    "GenerateDecoderOnlyOutput",
    "GenerationMixin",
    "InferenceParams",
    "capture_graph",
    "decode",
    "modify_logit_for_repetition_penalty",
    "sample",
    "update_graph_cache",
]


@dataclass
class GenerateDecoderOnlyOutput:
    """Prompts and continuations, (B, L), and the logits of each step, (B, V), if asked for."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


class Streamer(Protocol):
    """What tokens are given to as they come, such as the `TextStreamer` of transformers."""

    def put(self, value: Tensor) -> None:
        """Take the prompts, (B, L), or the next tokens, (B, 1), on the CPU."""

    def end(self) -> None:
        """There are no more."""


def sample(
    logits: Tensor,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Choose a token for each sequence, with PyTorch's random numbers.

    Args:
        logits: (B, V).
        top_k: Only among so many of the likeliest; 1 is greedy, 0 is no limit.
        top_p: Only among the likeliest that together have this probability; 0 is no limit.
        min_p: Only those of at least this probability relative to the likeliest; here in any batch,
            of probabilities, and together with the others.
        temperature: Divides the logits.

    Returns:
        (B,).
    """
    if not 0 <= top_p <= 1:
        raise ArgumentError(f"top_p: got {top_p}, wanted 0 to 1")
    if top_k == 1:
        return logits.argmax(dim=-1)
    batch, vocab_size = logits.shape
    limits = torch.tensor([1.0, temperature, top_p if 0 < top_p < 1 else 2.0, min_p])
    count = min(top_k, vocab_size) if top_k > 0 else vocab_size
    integers = torch.tensor([count, 0, 0])
    rows = SamplingRows(
        limits.to(logits.device).expand(batch, -1), integers.to(logits.device).expand(batch, -1)
    )
    return torch.multinomial(probabilities(logits.float(), rows, Method.CUT), 1).squeeze(1)


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Make tokens that were there already less likely, in place.

    Args:
        logits: (B, V).
        prev_output_tokens: (B, L).
        repetition_penalty: Divides positive logits, and multiplies negative ones.

    Returns:
        The logits.
    """
    if repetition_penalty == 1.0:
        return logits
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, prev_output_tokens, True)
    penalty = torch.tensor(repetition_penalty, device=logits.device, dtype=logits.dtype)
    return logits.copy_(penalise(logits, penalty, seen))


@torch.no_grad()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Streamer | None = None,
    attention_mask: Tensor | None = None,
) -> GenerateDecoderOnlyOutput:
    """Continue prompts.

    Args:
        input_ids: Prompts, (B, L).
        model: Called with token ids, `inference_params` and `num_last_tokens`; gives `logits`.
        max_length: Length of prompt and continuation together.
        top_k: As in `sample`.
        top_p: As in `sample`.
        min_p: As in `sample`.
        temperature: As in `sample`.
        repetition_penalty: As in `modify_logit_for_repetition_penalty`.
        eos_token_id: Ends a sequence; the rest of its row are the same token. Decoding ends when
            all sequences have. (The authors' code goes on until all give it at the same step.)
        teacher_outputs: Tokens to take instead of choosing some, (B, L'), prompts included.
        vocab_size: Only the first so many ids.
        cg: Whether to decode with a CUDA graph. On a CPU there is nothing to capture.
        enable_timing: Whether to print how long it takes.
        output_scores: Whether to keep the logits of each step, before the penalty.
        streamer: Gets prompts and tokens as they come.
        attention_mask: (B, L), 0 in front of prompts that are shorter: padding is to the left. The
            authors' code does not have it.
    """
    start = time.perf_counter()
    mask = _padding(attention_mask, input_ids)
    stepper = _Stepper(model, input_ids.shape[0], max_length, cg)
    tokens, scores = input_ids, list[Tensor]()
    if streamer is not None:
        streamer.put(input_ids.cpu())
    ended = torch.zeros_like(input_ids[:, :1], dtype=torch.bool)
    logits = stepper.read(input_ids, **mask)[:, :vocab_size]
    while True:
        scores += [logits.clone()] if output_scores else []
        length = tokens.shape[1]
        if teacher_outputs is not None and teacher_outputs.shape[1] > length:
            chosen = teacher_outputs[:, length : length + 1]
        else:
            logits = modify_logit_for_repetition_penalty(logits, tokens, repetition_penalty)
            chosen = sample(logits, top_k, top_p, min_p, temperature)[:, None]
        if eos_token_id is not None:
            chosen = torch.where(ended, eos_token_id, chosen)
            ended = ended | (chosen == eos_token_id)
        tokens = torch.cat([tokens, chosen], dim=1)
        if streamer is not None:
            streamer.put(chosen.cpu())
        if tokens.shape[1] >= max_length or (eos_token_id is not None and bool(ended.all())):
            break
        logits = stepper.read(chosen)[:, :vocab_size]
    if streamer is not None:
        streamer.end()
    if enable_timing:
        if tokens.is_cuda:
            torch.cuda.synchronize()
        print(f"Prompt processing + decoding time: {1000 * (time.perf_counter() - start):.0f}ms")  # noqa: T201
    return GenerateDecoderOnlyOutput(tokens, tuple(scores))


class _Stepper:
    """Reads tokens into a model's states, by a CUDA graph where one is captured."""

    def __init__(self, model: Any, batch: int, max_length: int, cg: bool) -> None:
        decoder = getattr(model, "decoder", lambda: None)()
        self._model = model if decoder is None else decoder
        self._cache: DecodingCGCache | None = None
        self._params = InferenceParams(max_length, batch)
        if cg and next(iter(self._model.parameters())).is_cuda:
            old = getattr(model, "_decoding_cache", None)
            self._cache = update_graph_cache(self._model, old, batch, 0, max_length)
            model._decoding_cache = self._cache
            assert self._cache.inference_params is not None
            self._params = self._cache.inference_params
            self._params.reset(max_length, batch)

    def read(self, tokens: Tensor, **mixer_kwargs: Any) -> Tensor:
        """Logits after tokens, (B, L): (B, V)."""
        offset = self._params.seqlen_offset
        if self._cache is not None and offset > 0:
            assert self._cache.run is not None
            logits = self._cache.run(tokens, None, offset)
        else:
            logits = self._model(
                tokens, inference_params=self._params, num_last_tokens=1, **mixer_kwargs
            ).logits
        self._params.seqlen_offset = offset + tokens.shape[1]
        return logits[:, -1]


def _padding(attention_mask: Tensor | None, input_ids: Tensor) -> dict[str, Tensor]:
    """What the mixers have to know of padding: it is another document."""
    if attention_mask is None:
        return {}
    mask = attention_mask.to(torch.int32)
    if mask.shape != input_ids.shape:
        raise ShapeError(
            f"attention_mask: got shape {tuple(mask.shape)}, wanted {tuple(input_ids.shape)} like input_ids"
        )
    if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1].all()):
        raise ArgumentError(
            "attention_mask: got padding to the right of tokens, wanted it to the left"
        )
    return {"seq_idx": mask}


class GenerationMixin:
    """Gives a model `generate`."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The states of all layers, by number; a model has to have it for `generate(cg=True)`."""
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continue prompts; see `decode`, whose arguments `kwargs` are.

        Returns:
            Prompts and continuations, (B, L); with `return_dict_in_generate` an object that has them
            as `sequences`, and the logits of each step as `scores`, if asked for.
        """
        sampling = top_k, top_p, min_p, temperature
        output = decode(
            input_ids, self, max_length, *sampling, output_scores=output_scores, **kwargs
        )
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences
