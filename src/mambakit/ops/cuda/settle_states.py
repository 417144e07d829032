"""Writes the states that steps have deferred; see `kernels/settle_states.cu`."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from mambakit.ops.cuda.arrays import TYPES, Variants
from mambakit.ops.cuda.compiler import kernel
from mambakit.ops.deferred_states import REPEATS, DeferredStates
from mambakit.ops.model_layer import Layer

THREADS, LANE_STATES = 256, 4
"""Of a block, and states of each; see the kernel."""


def settle_states(layers: Sequence[Layer], deferred: DeferredStates) -> None:
    """Write all states of these layers, which `many_rows_step` takes, with the bits that its steps would have written.

    Args:
        layers: First layer first.
        deferred: Of as many rows.
    """
    batch, channels, states = layers[0].ssm_state.shape
    inputs, B, turns = deferred.inputs, deferred.B, deferred.turns
    addresses = [t.data_ptr() for layer in layers for t in (layer.A_log, layer.ssm_state)]
    addresses += [inputs.data_ptr(), B.data_ptr(), turns.data_ptr()]
    numbers = deferred.stored_rows, batch, channels, layers[0].ssm_state.stride(0)
    parameters = struct.pack(f"{len(addresses) + len(numbers)}q", *addresses, *numbers)
    constants = _constants(inputs.dtype, len(layers), states)
    launch = kernel("settle_states.cu", "settle_states", turns.device, **constants)
    blocks = -(-channels * states // (LANE_STATES * THREADS))
    launch.with_struct(blocks * batch * len(layers), THREADS, parameters, shared=0)
    deferred.reset()


def _constants(dtype: torch.dtype, layers: int, states: int) -> dict[str, int | str]:
    return {"IO": TYPES[dtype], "LAYERS": layers, "D_STATE": states, "REPEATS": REPEATS}


def variants() -> Variants:
    """The kernels of two of the released models."""
    return [
        ("settle_states.cu", "settle_states", _constants(dtype, layers, 16))
        for dtype, layers in ((torch.bfloat16, 48), (torch.float16, 64))
    ]
