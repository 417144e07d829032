"""`mamba_ssm.modules.mamba_simple`: the mixer with the authors' constructor, cache and signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mambakit.compat.mamba_ssm.modules.block import Block
from mambakit.errors import ConfigError, ShapeError
from mambakit.nn.mixer import MambaMixer
from mambakit.nn.state import MixerState

if TYPE_CHECKING:
    from mambakit.compat.mamba_ssm.utils.inference_params import InferenceParams

__all__ = ["Block", "Mamba"]


class Mamba(MambaMixer):
    """`mambakit.nn.MambaMixer`, called as the authors' `Mamba` is.

    Differences to that, all of them on purpose: A_log, D and the bias of dt_proj stay float32 in half
    precision, and so does the cached state of the scan. A cached forward goes on from the cache with
    any number of positions.

    Args:
        d_model: Width of input and output (M).
        d_state: State size (N).
        d_conv: Width of the convolution (W).
        expand: D = expand * M.
        dt_rank: R; "auto" is ceil(M / 16).
        dt_min: Smallest initial time step.
        dt_max: Largest initial time step.
        dt_init: "random" or "constant".
        dt_scale: Factor of the initial weight of dt_proj.
        dt_init_floor: Initial time steps are not smaller than this.
        conv_bias: Whether the convolution has a bias.
        bias: Whether in_proj and out_proj have one.
        use_fast_path: Without effect: there is one path.
        layer_idx: Key of this layer's states in `InferenceParams`.
        device: Of the parameters.
        dtype: Of the parameters that may be narrow.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if expand != int(expand) or expand < 1:
            raise ConfigError(f"expand: got {expand}, wanted a whole number of at least 1")
        if dt_init not in ("random", "constant"):
            raise ConfigError(f"dt_init: got {dt_init!r}, wanted 'random' or 'constant'")
        with torch.device(device or torch.get_default_device()):
            super().__init__(
                d_model, d_state=d_state, d_conv=d_conv, expand=int(expand), dt_rank=dt_rank,
                dt_min=dt_min, dt_max=dt_max, dt_init=dt_init, dt_scale=dt_scale,
                dt_init_floor=dt_init_floor, conv_bias=conv_bias, bias=bias,
            )  # fmt: skip
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.expand, self.dt_rank = int(expand), self.dt_proj.in_features
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.activation, self.act = "silu", nn.SiLU()
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        if dtype is not None:
            self.to(dtype)

    def forward(  # type: ignore[override]  # the authors' arguments
        self,
        hidden_states: Tensor,
        inference_params: InferenceParams | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        """Mix a sequence.

        Args:
            hidden_states: (B, L, M).
            inference_params: Where the states are kept. With `seqlen_offset` 0 they start afresh.
            seq_idx: Document number of each position, (B, L); the state starts afresh where it
                changes. The authors' Mamba-1 does not have it.

        Returns:
            (B, L, M).
        """
        if inference_params is None:
            out, _ = super().forward(hidden_states, seq_idx=seq_idx)
            return out
        cache = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        starts = inference_params.seqlen_offset == 0
        return self._continue(hidden_states, cache, starts, seq_idx)

    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix one position, (B, 1, M), and update both states in place.

        Args:
            hidden_states: (B, 1, M).
            conv_state: The last inputs of the convolution, (B, D, W).
            ssm_state: (B, D, N).

        Returns:
            (B, 1, M), and the two states.
        """
        if hidden_states.shape[1] != 1:
            raise ShapeError(
                f"hidden_states: got {hidden_states.shape[1]} positions, wanted 1; forward takes more"
            )
        out = self._continue(hidden_states, (conv_state, ssm_state), starts=False)
        return out, conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """States before any position.

        Args:
            batch_size: B.
            max_seqlen: Without effect: states do not grow.
            dtype: Of the first. Default: that of the convolution. The second is float32 always.
            kwargs: Without effect.

        Returns:
            (B, D, W) and (B, D, N).
        """
        state = self.initial_state(batch_size)
        shape = (batch_size, self.d_inner, self.d_conv)
        conv_state = state.conv_state.new_zeros(shape, dtype=dtype or self.conv1d.weight.dtype)
        return conv_state, state.ssm_state

    def _get_states_from_cache(
        self, inference_params: InferenceParams, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The states of this layer; they are made at first use."""
        if self.layer_idx is None:
            raise ConfigError(
                "layer_idx: got None, wanted the number of the layer; give it to Mamba"
            )
        states = inference_params.key_value_memory_dict
        if self.layer_idx not in states:
            states[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        conv_state, ssm_state = states[self.layer_idx]
        if conv_state.shape[0] != batch_size:
            raise ShapeError(
                f"inference_params: got states of {conv_state.shape[0]} sequences, wanted {batch_size} "
                "like hidden_states; make new InferenceParams for another batch"
            )
        if initialize_states:
            conv_state.zero_()
            ssm_state.zero_()
        return conv_state, ssm_state

    def _continue(
        self,
        hidden: Tensor,
        cache: tuple[Tensor, Tensor],
        starts: bool,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        """Mix what comes after the states of the cache, and write the states after it there."""
        conv_state, ssm_state = cache
        wide = torch.promote_types(ssm_state.dtype, torch.float32)
        # A cache holds W inputs, one more than the next position needs.
        inputs = conv_state[..., 1:].to(hidden.dtype).contiguous()
        state = MixerState(inputs, ssm_state.to(wide))
        if torch.is_grad_enabled():
            out, state = super().forward(hidden, None if starts else state.clone(), seq_idx=seq_idx)
        elif starts or hidden.shape[1] > 1:
            out, state = super().forward(hidden, None if starts else state, seq_idx=seq_idx)
        else:
            out = super().step(hidden[:, 0], state)[:, None]
        with torch.no_grad():
            conv_state[..., 1:].copy_(state.conv_state)
            if state.ssm_state is not ssm_state:
                ssm_state.copy_(state.ssm_state)
        return out
