"""The causal depthwise convolution of the Mamba block as a module."""

from __future__ import annotations

from torch import Tensor, nn

from mambakit.ops import causal_conv1d, causal_conv1d_step


class CausalConv1d(nn.Conv1d):
    """Depthwise causal convolution and SiLU, channels last, with state.

    It is an `nn.Conv1d` for its parameters alone (weight (D, 1, W), bias (D,), and their
    initialisation), so that checkpoints carry over.

    Args:
        channels: D.
        width: Taps of each filter (W).
        bias: Whether each channel has a bias.
    """

    def __init__(self, channels: int, width: int, bias: bool = True) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=bias)

    def forward(  # type: ignore[override]  # channels last, with state
        self, x: Tensor, initial_state: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve x, (B, L, D); return y like x and the last W - 1 inputs, (B, D, W-1)."""
        weight = self.weight.squeeze(1)
        return causal_conv1d(
            x, weight, self.bias, "silu", initial_state=initial_state, seq_idx=seq_idx
        )

    def step(self, x: Tensor, conv_state: Tensor) -> Tensor:
        """Convolve one position, x (B, D); conv_state, (B, D, W-1), is updated in place."""
        return causal_conv1d_step(conv_state, x, self.weight.squeeze(1), self.bias, "silu")


def convolve(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """The output of a `CausalConv1d` with these parameters, without its state."""
    filters = weight.squeeze(1)
    return causal_conv1d(x, filters, bias, "silu", initial_state=initial_state, seq_idx=seq_idx)[0]
