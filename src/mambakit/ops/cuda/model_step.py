"""One decoding step of a whole model on a GPU, bound by the reading of the weights.

On Hopper a step of up to 128 rows in half precision is one kernel, if the model's sizes are even enough
(`one_kernel_step`, `many_rows_step`). Else it is four kernels a layer, that read every weight once and do what is
between the products at their ends. Each begins to read its weights while the one before still runs. For a few rows they
multiply number by number, for up to 64 on tensor cores, and then dt has a product of its own. For more rows, and for
what the tensor cores do not take, the products are PyTorch's (cuBLAS).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mambakit.ops.cuda import many_rows_step, one_kernel_step
from mambakit.ops.cuda.arrays import TYPES, Variants, lanes
from mambakit.ops.cuda.causal_conv1d import causal_conv1d_step
from mambakit.ops.cuda.compiler import kernel
from mambakit.ops.cuda.products import MOST_ROWS, tile_of
from mambakit.ops.cuda.rms_norm import add_rms_norm, rms_norm
from mambakit.ops.cuda.settle_states import settle_states
from mambakit.ops.cuda.settle_states import variants as settling_variants
from mambakit.ops.cuda.step_products import (
    FEW,
    NEIGHBOURS,
    are_for_tensor_cores,
    product,
    scaled_dtype,
    types,
)
from mambakit.ops.cuda.step_products import variants as product_variants
from mambakit.ops.deferred_states import DeferredStates
from mambakit.ops.model_layer import Layer

THREADS = 128
"""Of a block of the scan; see kernels/decode_scan.cu."""

PROJECTED_ROWS, PROJECTED_HELD = 4, 2
"""Of a block of the scan that has no projection to do, and of these, how many have their states on the way."""


class Kernels(enum.Enum):
    """What does a step: but for the library's products a row gets the same bits with the same ones."""

    ONE = enum.auto()
    """`one_kernel_step`."""
    ONE_OF_MANY_ROWS = enum.auto()
    """`many_rows_step`."""
    TENSOR_CORES = enum.auto()
    """Several, with the products of `tensor_core_products`."""
    FEW_ROWS = enum.auto()
    """Several, with products number by number."""
    LIBRARY = enum.auto()
    """Several, and PyTorch's products."""


class Residual(NamedTuple):
    """The residual stream of a step, with the first half of the norm that is next; see kernels/decode_norm.cuh."""

    stream: Tensor
    """(B, M), float32."""
    scaled: Tensor
    """Times the weight of the norm, (B, M); float32 for float16, which it could overflow."""
    squares: Tensor
    """Sums of squares of parts of each row, (B, parts), float32."""


def suitable(layers: Sequence[Layer], around: Sequence[Tensor]) -> bool:
    """Whether the kernels can read all tensors where they lie.

    Args:
        layers: First layer first.
        around: The embedding, (V, M), and the weights of the last norm and the head.
    """
    dtype, device = around[0].dtype, around[0].device
    if dtype not in TYPES:
        return False
    for layer in layers:
        norm, in_proj, conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj = layer[:10]
        numbers = (dt_bias, A_log, D)
        weights = (norm, in_proj, conv, conv_bias, x_proj, dt_proj, out_proj)
        if any(t.dtype is not torch.float32 for t in (*numbers, layer.ssm_state)):
            return False
        if any(t.dtype is not dtype for t in (*weights, layer.conv_state)):
            return False
        if not all(t.is_contiguous() for t in (*weights, *numbers)):
            return False
        tensors = (*weights, *numbers, layer.conv_state, layer.ssm_state)
        if any(t.device != device for t in tensors) or not _states_fit(layer):
            return False
    return all(t.dtype is dtype and t.device == device and t.is_contiguous() for t in around)


def kernels_of(layers: Sequence[Layer], around: Sequence[Tensor], batch: int) -> Kernels:
    """What does a step of so many rows; arguments as for `suitable`, which they are."""
    if one_kernel_step.suitable(layers, around, batch):
        return Kernels.ONE
    if many_rows_step.suitable(layers, around, batch):
        return Kernels.ONE_OF_MANY_ROWS
    if are_for_tensor_cores(layers[0], batch):
        return Kernels.TENSOR_CORES
    return Kernels.FEW_ROWS if batch <= MOST_ROWS else Kernels.LIBRARY


class ModelStep:
    """`model_step` of the tensors that these are now.

    Args:
        layers: First layer first.
        around: The embedding, (V, M), and the weights of the last norm and the head.
        eps: Of the norm of each layer, and of the last norm.
        deferred: What the states have not read, if this step and those before defer them. Default: states are written.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        around: Sequence[Tensor],
        eps: Sequence[float],
        deferred: DeferredStates | None = None,
    ) -> None:
        self._layers, self._around, self._eps = layers, around, eps
        self._deferred = deferred

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits, (B, V), of tokens, (B,); the states move on."""
        embedding, norm_f, head = self._around
        return model_step(self._layers, embedding, norm_f, head, self._eps, tokens, self._deferred)

    def can_defer(self, batch: int) -> bool:
        """Whether a step of so many rows can defer states."""
        return kernels_of(self._layers, self._around, batch) is Kernels.ONE_OF_MANY_ROWS

    def should_defer(self, batch: int) -> bool:
        """Whether it can, and is faster then."""
        is_wide = self._around[0].shape[1] >= many_rows_step.LEAST_WIDTH_TO_DEFER
        is_many = batch >= many_rows_step.FEWEST_ROWS_TO_DEFER
        return is_wide and is_many and self.can_defer(batch)

    def settle(self) -> None:
        """Write the states that have been deferred."""
        assert self._deferred is not None
        settle_states(self._layers, self._deferred)
        increment_version([layer.ssm_state for layer in self._layers])

    def gives_same_bits(self, batch: int, other: int) -> bool:
        """Whether a row gets the same bits among so many rows as among so many others."""
        kernels = [kernels_of(self._layers, self._around, rows) for rows in (batch, other)]
        return batch == other or (kernels[0] is kernels[1] is not Kernels.LIBRARY)


@torch.no_grad()
def model_step(
    layers: Sequence[Layer],
    embedding: Tensor,
    norm_f: Tensor,
    head: Tensor,
    eps: Sequence[float],
    tokens: Tensor,
    deferred: DeferredStates | None = None,
) -> Tensor:
    """Logits, (B, V), of a token a sequence, (B,); the states move on.

    All tensors are `suitable`. With kernels of our own a row does not depend on the other rows of the batch, nor on how
    many there are, as long as the same kernels multiply: for up to 8 rows in one kernel, for 9 to 128 in another, for
    few rows, or for those of `tensor_core_products`. A token that is none is an error of the device.

    Args:
        layers: First layer first.
        embedding: (V, M).
        norm_f: Weight of the last norm, (M,).
        head: (V, M).
        eps: Of the norm of each layer, and of the last norm.
        tokens: (B,), int32 or int64, on the same device.
        deferred: As of `ModelStep`, which `can_defer`.
    """
    norms = [*(layer.norm for layer in layers), norm_f]
    batch = tokens.shape[0]
    if batch == 0:
        return head.new_empty(0, head.shape[0])
    kernels = kernels_of(layers, (embedding, norm_f, head), batch)
    assert deferred is None or kernels is Kernels.ONE_OF_MANY_ROWS
    if kernels is Kernels.ONE:
        logits = one_kernel_step.step(tokens, embedding, layers, norm_f, head, eps)
    elif kernels is Kernels.ONE_OF_MANY_ROWS:
        logits = many_rows_step.step(tokens, embedding, layers, norm_f, head, eps, deferred)
    else:
        is_library = kernels is Kernels.LIBRARY
        step = _with_library_products if is_library else _with_own_products
        logits = step(tokens, embedding, layers, norms, head, eps)
    increment_version([*chain.from_iterable((la.conv_state, la.ssm_state) for la in layers)])
    return logits


def _with_own_products(
    tokens: Tensor,
    embedding: Tensor,
    layers: Sequence[Layer],
    norms: Sequence[Tensor],
    head: Tensor,
    eps: Sequence[float],
) -> Tensor:
    # The first kernel waits for all that was before the step; the others only for one another.
    residual = embed(tokens, embedding, norms[0])
    are_few = not are_for_tensor_cores(layers[0], tokens.shape[0])  # The scan projects dt itself.
    for layer, norm, epsilon in zip(layers, norms[1:], eps, strict=False):
        x, z = in_proj(layer, residual, epsilon, overlaps=True)
        steering = project(layer.x_proj, x, torch.float32 if are_few else x.dtype, overlaps=True)
        dt = None
        if not are_few:
            low = steering[:, : layer.dt_proj.shape[1]]
            dt = project(layer.dt_proj, low, x.dtype, overlaps=True)
        y = scan(layer, x, z, steering, dt, overlaps=True)
        residual = out_proj(layer, y, residual, norm, overlaps=True)
    return logits_of(head, residual, eps[-1], overlaps=True)


def _with_library_products(
    tokens: Tensor,
    embedding: Tensor,
    layers: Sequence[Layer],
    norms: Sequence[Tensor],
    head: Tensor,
    eps: Sequence[float],
) -> Tensor:
    hidden = embedding.index_select(0, tokens)
    normed, residual = rms_norm(hidden, norms[0], eps[0]), hidden.float()
    for layer, norm, epsilon in zip(layers, norms[1:], eps[1:], strict=True):
        x, z = (normed @ layer.in_proj.t()).chunk(2, dim=-1)
        x = causal_conv1d_step(layer.conv_state, x, layer.conv.squeeze(1), layer.conv_bias, "silu")
        steering = x @ layer.x_proj.t()
        dt = steering[:, : layer.dt_proj.shape[1]] @ layer.dt_proj.t()
        y = scan(layer, x, z, steering, dt, overlaps=True)
        normed, residual = add_rms_norm(y @ layer.out_proj.t(), residual, norm, epsilon)
    return normed @ head.t()


def embed(tokens: Tensor, embedding: Tensor, norm: Tensor) -> Residual:
    """The residual stream before the first layer.

    Args:
        tokens: (B,).
        embedding: (V, M).
        norm: Weight of the first norm, (M,).
    """
    tokens = tokens.contiguous()
    batch, (vocab, width) = tokens.shape[0], embedding.shape
    residual = _residual(embedding, batch, width, parts=1)
    launch = kernel(
        "decode_embedding.cu", "decode_embedding", embedding.device,
        **types(embedding.dtype, scaled_dtype(embedding.dtype)),
        TOKEN="int64" if tokens.dtype == torch.int64 else "int",
    )  # fmt: skip
    launch(batch, 256, tokens, embedding, vocab, norm, *residual, width)
    return residual


def in_proj(
    layer: Layer, residual: Residual, eps: float, *, overlaps: bool = False
) -> tuple[Tensor, Tensor]:
    """x after the convolution, whose state moves on, and z; both (B, D).

    Args:
        layer: Its tensors.
        residual: With the weight of this layer's norm.
        eps: Of the norm.
        overlaps: Whether it may read weights and states while the kernel before it runs. All that wrote them must have
            ended before that kernel began.
    """
    weight, scaled = layer.in_proj, residual.scaled
    batch, width = scaled.shape
    channels = weight.shape[0] // 2
    x, z = weight.new_empty(2, batch, channels)
    by = product(weight, scaled, _neighbouring_channels(layer))
    launch = kernel(
        "decode_in_proj.cu", "decode_in_proj", weight.device, **by.constants,
        TAPS=layer.conv.shape[-1],
    )  # fmt: skip
    launch(
        by.grid, by.block, weight, layer.conv, layer.conv_bias, scaled, residual.squares,
        residual.squares.shape[1], eps, layer.conv_state, *layer.conv_state.stride(), x, z, batch, channels, width,
        shared=by.shared, overlaps=overlaps,
    )  # fmt: skip
    return x, z


def project(weight: Tensor, x: Tensor, dtype: torch.dtype, *, overlaps: bool = False) -> Tensor:
    """x W^T, (B, O): with x_proj what steers the scan, dt at low rank, B and C; with dt_proj dt.

    Args:
        weight: (O, K).
        x: (B, K), with neighbouring numbers of a row side by side.
        dtype: Of the result.
        overlaps: As in `in_proj`.
    """
    y = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    by = product(weight, x, lanes(NEIGHBOURS, weight.shape[0]))
    launch = kernel("decode_linear.cu", "decode_linear", x.device, **by.constants, Y=TYPES[dtype])
    launch(
        by.grid, by.block, weight, x, x.stride(0), y, x.shape[0], *weight.shape,
        shared=by.shared, overlaps=overlaps,
    )  # fmt: skip
    return y


def scan(
    layer: Layer,
    x: Tensor,
    z: Tensor,
    steering: Tensor,
    dt: Tensor | None = None,
    *,
    overlaps: bool = False,
) -> Tensor:
    """y, (B, D), of a step of the scan with its gate; the state moves on.

    Args:
        layer: Its tensors.
        x: (B, D), with neighbouring channels side by side, as z.
        z: (B, D).
        steering: dt at low rank, B and C, (B, R + 2 N), float32 or the dtype of x.
        dt: After its projection, (B, D), contiguous, in the dtype of x; default: the kernel projects.
        overlaps: As in `in_proj`.
    """
    batch, channels = x.shape
    y = x.new_empty(batch, channels)
    rank, state = layer.dt_proj.shape[1], layer.ssm_state
    constants = _scan_constants(layer, steering, batch, dt is not None)
    tile, per_block = int(constants["BATCH"]), THREADS // int(constants["SPREAD"])
    launch = kernel("decode_scan.cu", "decode_scan", x.device, **constants)
    launch(
        (-(-channels // per_block), -(-batch // tile)), THREADS, layer.dt_proj if dt is None else dt, layer.dt_bias,
        layer.A_log, layer.D, steering, steering.stride(0), x, x.stride(0), z, z.stride(0), state, *state.stride()[:2],
        y, batch, channels, rank, state.shape[2], overlaps=overlaps,
    )  # fmt: skip
    return y


def out_proj(
    layer: Layer, y: Tensor, residual: Residual, norm: Tensor, *, overlaps: bool = False
) -> Residual:
    """The residual stream, to which the layer's output is added in place.

    Args:
        layer: Its tensors.
        y: (B, D).
        residual: Before the layer; its stream is changed.
        norm: Weight of the norm after the layer, (M,).
        overlaps: As in `in_proj`.
    """
    weight = layer.out_proj
    by = product(weight, y, lanes(NEIGHBOURS, weight.shape[0], norm, residual.stream))
    after = _residual(weight, y.shape[0], weight.shape[0], parts=by.parts, stream=residual.stream)
    launch = kernel(
        "decode_out_proj.cu", "decode_out_proj", y.device, **by.constants,
        SCALED=TYPES[after.scaled.dtype],
    )  # fmt: skip
    launch(
        by.grid, by.block, weight, norm, y, *after, y.shape[0], *weight.shape,
        shared=by.shared, overlaps=overlaps,
    )  # fmt: skip
    return after


def logits_of(head: Tensor, residual: Residual, eps: float, *, overlaps: bool = False) -> Tensor:
    """Logits, (B, V), of the residual stream after the last layer; arguments as in `in_proj`."""
    batch, (vocab, width) = residual.scaled.shape[0], head.shape
    logits = head.new_empty(batch, vocab)
    by = product(head, residual.scaled, lanes(NEIGHBOURS, vocab))
    launch = kernel("decode_head.cu", "decode_head", head.device, **by.constants)
    launch(
        by.grid, by.block, head, residual.scaled, residual.squares, residual.squares.shape[1], eps, logits,
        batch, vocab, width, shared=by.shared, overlaps=overlaps,
    )  # fmt: skip
    return logits


def _neighbouring_channels(layer: Layer) -> int:
    """How many channels' filters and states can be read side by side."""
    state, taps = layer.conv_state, layer.conv.shape[-1]
    side_by_side = taps == 1 or (state.stride(2) == 1 and state.stride(1) == taps - 1)
    if not side_by_side:
        return 1
    return lanes(NEIGHBOURS, state.shape[1], layer.conv.flatten(), layer.conv_bias, state[:, 0])


def _residual(
    like: Tensor, batch: int, width: int, *, parts: int, stream: Tensor | None = None
) -> Residual:
    if stream is None:
        stream = torch.empty(batch, width, device=like.device)
    scaled = like.new_empty(batch, width, dtype=scaled_dtype(like.dtype))
    return Residual(stream, scaled, torch.empty(batch, parts, device=like.device))


def _scan_constants(
    layer: Layer, steering: Tensor, batch: int, is_projected: bool
) -> dict[str, int | str]:
    weight, rank = layer.dt_proj, layer.dt_proj.shape[1]
    along = lanes(16 // weight.element_size(), rank, weight, steering)
    states = _states(layer)
    spread = _spread(layer.ssm_state.shape[2], states)
    tile = PROJECTED_ROWS if is_projected else tile_of(batch)
    return {
        **types(weight.dtype, steering.dtype),
        **_scan_layout(states, spread, along, rank, tile),
        "STEERS": lanes(states, layer.A_log.shape[1], steering[:, rank:]),
        "PROJECTED": int(is_projected),
        "HELD": PROJECTED_HELD if is_projected else tile,
    }


def _scan_layout(states: int, spread: int, along: int, rank: int, tile: int) -> dict[str, int]:
    depth = max(1, min(4 if tile < MOST_ROWS else 2, -(-rank // (spread * along))))
    return {
        "STATES": states,
        "SPREAD": spread,
        "LANES": along,
        "ROWS": 1,
        "DEPTH": depth,
        "BATCH": tile,
        "AHEAD": min(2, tile),
    }


def _states(layer: Layer) -> int:
    """Neighbouring states of a lane."""
    return lanes(4, layer.A_log.shape[1], layer.A_log, layer.ssm_state)


def _spread(d_state: int, states: int) -> int:
    """Lanes that share a channel."""
    return 1 << (-(-d_state // states) - 1).bit_length()


def _states_fit(layer: Layer) -> bool:
    """Whether a warp holds the states of a channel, and reads neighbouring ones side by side."""
    d_state = layer.ssm_state.shape[2]
    side_by_side = layer.ssm_state.stride(2) == 1 or d_state == 1
    return side_by_side and _spread(d_state, _states(layer)) <= 32


def variants() -> Variants:
    """The kernels of the released models' shapes on 132 multiprocessors, and of odd sizes."""
    found = product_variants()
    for d_model, batch, io in FEW:
        rank = -(-d_model // 16)
        states, spread = (4, 4) if d_model > 17 else (1, 8)
        layout = _scan_layout(states, spread, lanes(16 // io.itemsize, rank), rank, batch)
        own = {"STEERS": lanes(states, rank), "PROJECTED": 0, "HELD": batch}
        unprojected = {**types(io, torch.float32), **layout, **own}
        layout = _scan_layout(states, spread, 1, rank, PROJECTED_ROWS)
        own |= {"PROJECTED": 1, "HELD": PROJECTED_HELD}
        projected = {**types(io, io), **layout, **own}
        embedding = {**types(io, scaled_dtype(io)), "TOKEN": "int64"}
        found += [
            ("decode_scan.cu", "decode_scan", unprojected),
            ("decode_scan.cu", "decode_scan", projected),
            ("decode_embedding.cu", "decode_embedding", embedding),
        ]
    return found + one_kernel_step.variants() + many_rows_step.variants() + settling_variants()
