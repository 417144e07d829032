"""Layers of a decoding step, for tests of what kernels take."""

from __future__ import annotations

import torch

from mambakit.ops.model_layer import Layer


def zero_layer(
    dtype: torch.dtype, width: int, batch: int, rank: int | None = None, states: int = 16
) -> Layer:
    """Zeros in the shapes of a released model so wide, with the states of so many rows."""
    channels = 2 * width
    rank = width // 16 if rank is None else rank

    def half(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    return Layer(
        norm=half(width),
        in_proj=half(2 * channels, width),
        conv=half(channels, 1, 4),
        conv_bias=half(channels),
        x_proj=half(rank + 2 * states, channels),
        dt_proj=half(channels, rank),
        dt_bias=torch.zeros(channels),
        A_log=torch.zeros(channels, states),
        D=torch.zeros(channels),
        out_proj=half(width, channels),
        conv_state=half(batch, channels, 3),
        ssm_state=torch.zeros(batch, channels, states),
    )
