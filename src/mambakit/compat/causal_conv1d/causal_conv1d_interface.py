"""`causal_conv1d` with the signatures of the package of that name: (B, D, L) in and out.

Any layout in memory is taken. Of channels that are neighbours in memory, as a matrix product followed
by a transpose leaves them, nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.errors import ShapeError
from mambakit.ops import causal_conv1d


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own short filter over the present and the past.

    Args:
        x: Input, (B, D, L).
        weight: Filters, (D, W).
        bias: (D,).
        seq_idx: Document number of each position, (B, L); where it is negative the output is zero.
        initial_states: The inputs before position 0, (B, D, W-1).
        return_final_states: Whether to return the last W - 1 inputs too. Here it goes together
            with `seq_idx`.
        final_states_out: Where to write those, (B, D, W-1).
        activation: None, "silu" or "swish", which is the same.

    Returns:
        (B, D, L) in the dtype of x; and the last inputs, (B, D, W-1), if asked for.
    """
    arguments = x, weight, bias, seq_idx, initial_states
    return _run(*arguments, return_final_states, final_states_out, activation, "auto")


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d_fn` by the reference backend; mind the other order of arguments."""
    arguments = x, weight, bias, seq_idx, initial_states
    return _run(*arguments, return_final_states, final_states_out, activation, "reference")


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Go on with the convolution by one or more positions; `conv_state` is updated in place.

    Args:
        x: Input, (B, D) or (B, D, L).
        conv_state: The last inputs, oldest first, (B, D, S) with S >= W - 1; with
            `conv_state_indices` of more sequences than B.
        weight: Filters, (D, W).
        bias: (D,).
        activation: None, "silu" or "swish".
        cache_seqlens: Number of inputs so far, (B,). If given, `conv_state` is a ring, whose next
            place is that number modulo S.
        conv_state_indices: Which row of `conv_state` belongs to each row of x, (B,). Rows of x
            with a negative one are padding: their output is zero.

    Returns:
        Like x.
    """
    return _update(
        x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, "auto"
    )


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` by the reference backend."""
    return _update(x, conv_state, weight, bias, activation, cache_seqlens, None, "reference")


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    return_final_states: bool,
    final_states_out: Tensor | None,
    activation: str | None,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    y, state = causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        _silu_or_none(activation),
        initial_state=initial_states,
        seq_idx=seq_idx,
        backend=backend,
    )
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0)[..., None], 0)
    if not return_final_states:
        return y.transpose(1, 2)
    if final_states_out is not None:
        state = final_states_out.copy_(state)
    return y.transpose(1, 2), state


def _update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    backend: str,
) -> Tensor:
    if x.ndim == 2:
        arguments = weight, bias, activation, cache_seqlens, conv_state_indices, backend
        return _update(x[..., None], conv_state, *arguments).squeeze(-1)
    length, width = conv_state.shape[-1], weight.shape[1]
    if length < width - 1:
        raise ShapeError(
            f"conv_state: got {length} inputs, wanted at least {width - 1}, one less than the filter has taps"
        )
    state, is_padding = conv_state, None
    if conv_state_indices is not None:
        is_padding = conv_state_indices < 0
        state = conv_state[conv_state_indices.clamp(min=0).long()]
    past = _last(state, width - 1, cache_seqlens)
    y, _ = causal_conv1d(
        x.transpose(1, 2), weight, bias, _silu_or_none(activation), initial_state=past, backend=backend
    )  # fmt: skip
    y = y.transpose(1, 2)
    with torch.no_grad():
        new = _remember(state, x, cache_seqlens)
        if conv_state_indices is None:
            conv_state.copy_(new)
        else:
            _put(conv_state, conv_state_indices, new)
    return y if is_padding is None else y.masked_fill(is_padding[:, None, None], 0)


def _last(state: Tensor, count: int, cache_seqlens: Tensor | None) -> Tensor:
    """The last inputs of a state, (B, D, count), oldest first."""
    if cache_seqlens is None:
        return state[..., state.shape[-1] - count :]
    places = torch.arange(-count, 0, device=state.device) + cache_seqlens[:, None]
    return state.gather(2, _in_ring(places, state))


def _remember(state: Tensor, x: Tensor, cache_seqlens: Tensor | None) -> Tensor:
    """The state, (B, D, S), after the inputs x, (B, D, L)."""
    length = state.shape[-1]
    if cache_seqlens is None:
        return torch.cat([state, x.to(state.dtype)], dim=-1)[..., x.shape[-1] :]
    # More than fill the ring would write a place twice.
    first = max(x.shape[-1] - length, 0)
    places = torch.arange(first, x.shape[-1], device=x.device) + cache_seqlens[:, None]
    return state.scatter(2, _in_ring(places, state), x[..., first:].to(state.dtype))


def _in_ring(places: Tensor, state: Tensor) -> Tensor:
    """Places counted from the first input of all, (B, L), as indices into a state (B, D, S)."""
    return places.remainder(state.shape[-1])[:, None].expand(-1, state.shape[1], -1).long()


def _put(target: Tensor, indices: Tensor, rows: Tensor) -> None:
    """Write rows to their places in `target`, except where an index is negative."""
    # To pick rows out would wait for a GPU: a row of padding writes to place 0 what comes there anyway.
    is_first = (indices == 0)[:, None, None]
    zeroth = torch.where(is_first.any(), torch.where(is_first, rows, 0).sum(0), target[0])
    is_padding = (indices < 0)[:, None, None]
    target[indices.clamp(min=0).long()] = torch.where(is_padding, zeroth, rows)


def _silu_or_none(activation: str | None) -> str | None:
    return "silu" if activation == "swish" else activation
