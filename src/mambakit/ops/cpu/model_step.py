"""One decoding step of a whole model in one compiled call: nothing but the memory's speed holds it up.

Operation by operation, Python and the hand-overs between threads take as long as reading the weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mambakit.ops.cpu.arrays import array
from mambakit.ops.cpu.linear import SMALL
from mambakit.ops.cpu.threads import run
from mambakit.ops.model_layer import Layer

NAP_SECONDS = 1e-4


def suitable(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernel can read them where they lie."""
    return all(t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() for t in tensors)


def model_step(
    embedded: Tensor,
    layers: Sequence[Layer],
    norm_f: Tensor,
    head: Tensor,
    eps: Sequence[float],
    mixer_eps: float | None,
) -> Tensor:
    """Logits, (B, V), from the embeddings of a token a sequence, (B, M); the states move on.

    All tensors are `suitable`. A row does not depend on the other rows of the batch, nor on the number of threads.

    Args:
        embedded: (B, M); overwritten.
        layers: First layer first.
        norm_f: Weight of the last norm, (M,).
        head: (V, M).
        eps: Of the norm of each layer, and of the last norm.
        mixer_eps: Of the norms of dt, B and C; None: there are none.
    """
    from mambakit.ops.cpu.kernels.model_step import PARTS, Rows, Sizes

    batch, d_model = embedded.shape
    d_inner, d_state = layers[0].A_log.shape
    dt_rank = layers[0].dt_proj.shape[1]
    sizes = Sizes(len(layers), d_model, d_inner, d_state, layers[0].conv.shape[-1], dt_rank)
    addresses = [*map(Tensor.data_ptr, chain.from_iterable(layers))]
    table = np.array(addresses, np.int64).view(_ADDRESSES)
    logits = embedded.new_empty(batch, head.shape[0])
    rows = Rows(
        hidden=np.zeros((batch, d_model), np.float32),
        residual=array(embedded),
        normed=np.empty((batch, d_model), np.float32),
        xz=np.empty((batch, 2 * d_inner), np.float32),
        x=np.empty((batch, d_inner), np.float32),
        steering=np.empty((batch, dt_rank + 2 * d_state), np.float32),
        dt=np.empty((batch, d_inner), np.float32),
        y=np.empty((batch, d_inner), np.float32),
        logits=array(logits),
    )
    claimed, done = np.zeros((2, PARTS * len(layers) + 2), np.int64)
    weights = len(layers) * layers[0].in_proj.numel() + head.numel()
    threads = torch.get_num_threads() if weights > SMALL else 1
    run(
        _walk, threads, sizes, table, np.array(eps, np.float32),
        None if mixer_eps is None else np.float32(mixer_eps), array(norm_f), array(head), rows, claimed, done,
    )  # fmt: skip
    increment_version([state for layer in layers for state in (layer.conv_state, layer.ssm_state)])
    return logits


_ADDRESSES = np.dtype([(name, np.int64) for name in Layer._fields])


def _walk(first: int, last: int, sizes: Any, *args: Any) -> None:
    """A thread's part in the step; when it has waited too long, others get its processor for a while."""
    from mambakit.ops.cpu.kernels.model_step import PARTS, walk

    phase = 0
    while (phase := walk(phase, sizes, *args)) < PARTS * sizes.layers + 2:
        time.sleep(NAP_SECONDS)
