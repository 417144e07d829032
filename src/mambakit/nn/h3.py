"""The block of H3, with a selective or a time-invariant scan: rows of the paper's Tables 1 and 6."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mambakit.nn.ends import WHOLE, Ends
from mambakit.nn.linear import Linear
from mambakit.nn.mixer import MambaMixer
from mambakit.nn.state import MixerState
from mambakit.ops import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step


class H3Mixer(MambaMixer):
    """Gates before and behind the scan, no activation: linear attention with a scan in its middle.

        q, k, v = in_proj(hidden);  x = conv1d(k) * v;  dt, B, C = x_proj(x)
        y = out_proj(q * scan(x, softplus(dt_proj(dt) + dt_bias), A, B, C, D))

    The short convolution is H3's "shift" SSM, with the width of Mamba's. Heads have one channel.

    Args:
        d_model: Width of the input and the output (M).
        **options: As for `MambaMixer`.

    Source: Fu et al. 2023 (arXiv 2212.14052), section 3.1; Gu & Dao 2023, Figure 3 and Table 1.
    """

    def __init__(self, d_model: int, **options: Any) -> None:
        super().__init__(d_model, **options)
        self.in_proj = Linear(d_model, 3 * self.d_inner, bias=self.in_proj.bias is not None)

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
        q, k, v = self.in_proj(hidden).chunk(3, dim=-1)
        old_conv_state, ssm_state = (state.conv_state, state.ssm_state) if state else (None, None)
        filters, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        convolved, conv_state = causal_conv1d(
            k, filters, bias, initial_state=old_conv_state, seq_idx=seq_idx
        )
        conv_state = ends.last_inputs(conv_state, k, old_conv_state)
        x = convolved * v
        dt, B, C = self._steering(x)
        dt, A, dt_bias = ends.without_padding(dt), self._decay(), self._dt_bias()
        y, ssm_state = selective_scan(
            x, dt, A, B, C, self.D, None, dt_bias, True, initial_state=ssm_state, seq_idx=seq_idx
        )
        return self._output(q * y, ends if only_last else None), MixerState(conv_state, ssm_state)

    def step(self, hidden: Tensor, state: MixerState) -> Tensor:
        """Mix one position, (B, M) to (B, M); `state` is updated in place. Has no gradient."""
        q, k, v = self.in_proj(hidden).chunk(3, dim=-1)
        filters, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        x = causal_conv1d_step(state.conv_state, k, filters, bias) * v
        dt, B, C = self._steering(x)
        A, dt_bias = self._decay(), self._dt_bias()
        y = selective_scan_step(state.ssm_state, x, dt, A, B, C, self.D, None, dt_bias, True)
        out: Tensor = self.out_proj(q * y)
        return out
