"""The Mamba mixer without its gate: a row of the paper's Table 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mambakit.nn.ends import WHOLE, Ends
from mambakit.nn.linear import Linear
from mambakit.nn.mixer import MambaMixer
from mambakit.nn.state import MixerState
from mambakit.ops import selective_scan, selective_scan_step


class UngatedMixer(MambaMixer):
    """A `MambaMixer` without z: all that differs is the gate.

        x = silu(conv1d(in_proj(hidden)));  dt, B, C = x_proj(x)
        y = out_proj(scan(x, softplus(dt_proj(dt) + dt_bias), A, B, C, D))

    Args:
        d_model: Width of the input and the output (M).
        **options: As for `MambaMixer`.

    Source: Gu & Dao 2023, Table 1, "No gate". It does not say what else differs from Mamba's block; here
    nothing does.
    """

    def __init__(self, d_model: int, **options: Any) -> None:
        super().__init__(d_model, **options)
        self.in_proj = Linear(d_model, self.d_inner, bias=self.in_proj.bias is not None)

    def forward(
        self,
        hidden: Tensor,
        state: MixerState | None = None,
        *,
        seq_idx: Tensor | None = None,
        ends: Ends = WHOLE,
        only_last: bool = False,
    ) -> tuple[Tensor, MixerState]:
        """Mix a sequence; arguments and results as in `MambaMixer.forward`."""
        old_conv_state, ssm_state = (state.conv_state, state.ssm_state) if state else (None, None)
        inputs = self.in_proj(hidden)
        x, conv_state = self.conv1d(inputs, old_conv_state, seq_idx)
        conv_state = ends.last_inputs(conv_state, inputs, old_conv_state)
        dt, B, C = self._steering(x)
        dt, A, dt_bias = ends.without_padding(dt), self._decay(), self._dt_bias()
        y, ssm_state = selective_scan(
            x, dt, A, B, C, self.D, None, dt_bias, True, initial_state=ssm_state, seq_idx=seq_idx
        )
        return self._output(y, ends if only_last else None), MixerState(conv_state, ssm_state)

    def step(self, hidden: Tensor, state: MixerState) -> Tensor:
        """Mix one position, (B, M) to (B, M); `state` is updated in place. Has no gradient."""
        x = self.conv1d.step(self.in_proj(hidden), state.conv_state)
        dt, B, C = self._steering(x)
        A, dt_bias = self._decay(), self._dt_bias()
        y = selective_scan_step(state.ssm_state, x, dt, A, B, C, self.D, None, dt_bias, True)
        out: Tensor = self.out_proj(y)
        return out
