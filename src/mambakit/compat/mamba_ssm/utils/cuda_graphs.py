"""A decoding step as a CUDA graph; `mamba_ssm.utils.generation` exports it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mambakit.compat.mamba_ssm.utils.inference_params import InferenceParams

Run = Callable[[Tensor, "Tensor | None", int], Tensor]
"""Token ids (B, L), position ids (without effect) and position to logits, (B, L, V)."""


@dataclass
class DecodingCGCache:
    """The graphs of a model, and the states that they work on.

    Attributes:
        max_batch_size: Sequences of the states.
        max_seqlen: Without effect: states do not grow.
        device: Of the model when the graphs were captured.
        dtype: The same.
        read: What the graphs read: the type of the model, and the addresses of its weights.
        callables: Graph of each (batch, positions at once).
        mempool: Memory that the graphs share.
        inference_params: The states.
        run: Replays the graph for its arguments.
    """

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    read: tuple[Any, ...] = ()
    callables: dict[tuple[int, int], Run] = field(default_factory=dict)
    mempool: Any = None
    inference_params: InferenceParams | None = None
    run: Run | None = None


@torch.no_grad()
def update_graph_cache(
    model: Any,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: tuple[int, ...] = (1,),
    dtype: torch.dtype | None = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """Capture what `cache` does not hold yet.

    Args:
        model: Has `allocate_inference_cache`, and is called as by `decode`.
        cache: From an earlier call. One for another batch, dtype or other weights is thrown away.
        batch_size: B.
        seqlen_og: Without effect.
        max_seqlen: Without effect.
        decoding_seqlens: Numbers of positions at once.
        dtype: Of the states. Default: that of the model.
        n_warmups: Steps before the capture.
    """
    parameter = next(iter(model.parameters()))
    device, dtype = parameter.device, dtype or parameter.dtype
    read = (type(model), *(parameter.data_ptr() for parameter in model.parameters()))
    wanted = device, dtype, batch_size, read
    if cache is None or (cache.device, cache.dtype, cache.max_batch_size, cache.read) != wanted:
        states = model.allocate_inference_cache(batch_size, max_seqlen, dtype)
        new = InferenceParams(max_seqlen, batch_size, key_value_memory_dict=states)
        pool = torch.cuda.graph_pool_handle()
        cache = DecodingCGCache(
            batch_size, max_seqlen, device, dtype, read=read, mempool=pool, inference_params=new
        )
    graphs, params = cache.callables, cache.inference_params
    assert params is not None
    for count in decoding_seqlens:
        if (batch_size, count) not in graphs:
            graphs[batch_size, count] = capture_graph(
                model, params, batch_size, max_seqlen, count, cache.mempool, n_warmups
            )
    cache.run = lambda ids, positions, seqlen: graphs[ids.shape[0], ids.shape[1]](
        ids, positions, seqlen
    )
    params.seqlen_offset = 0
    return cache


def capture_graph(
    model: Any,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: Any = None,
    n_warmups: int = 2,
) -> Run:
    """Record one call of the model on the states of `inference_params`, which it changes.

    Args:
        model: As in `update_graph_cache`.
        inference_params: The states.
        batch_size: B.
        max_seqlen: Without effect.
        decoding_seqlen: Positions at once.
        mempool: Memory to share with other graphs.
        n_warmups: Steps before the capture: what is made at first use must not be recorded.

    Returns:
        A function that replays it.
    """
    device = next(iter(model.parameters())).device
    tokens = torch.zeros(batch_size, decoding_seqlen, dtype=torch.long, device=device)
    before = inference_params.seqlen_offset
    inference_params.seqlen_offset = 1  # Anything but the beginning.

    def call() -> Tensor:
        output = model(tokens, inference_params=inference_params, num_last_tokens=decoding_seqlen)
        logits: Tensor = output.logits
        return logits

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(n_warmups):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # A graph that is garbage would break the capture if it went during it.
    with torch.cuda.graph(graph, pool=mempool):
        logits = call()
    inference_params.seqlen_offset = before

    def run(input_ids: Tensor, position_ids: Tensor | None, seqlen: int) -> Tensor:
        tokens.copy_(input_ids)
        graph.replay()
        return logits.clone()

    return run
