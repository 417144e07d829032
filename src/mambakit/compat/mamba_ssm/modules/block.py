"""`mamba_ssm.modules.block`: norm and mixer around the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mambakit.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn

if TYPE_CHECKING:
    from mambakit.compat.mamba_ssm.utils.inference_params import InferenceParams


class Block(nn.Module):
    """residual' = residual + hidden;  hidden' = mixer(norm(residual')), and the same for an MLP.

    The sum of the last two is left to the next block.

    Args:
        dim: M.
        mixer_cls: Makes the mixer of dim.
        mlp_cls: Makes the MLP of dim; `nn.Identity` is none.
        norm_cls: Makes a norm of dim.
        fused_add_norm: Without effect on the result: sum and norm are fused wherever they can be.
        residual_in_fp32: Whether the residual stream is at least float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Any = nn.Identity,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Run a sequence.

        Args:
            hidden_states: Output of the previous block, (B, L, M).
            residual: The residual stream without it; None in front of the first block.
            inference_params: For the mixer.
            mixer_kwargs: For the mixer.

        Returns:
            The same two for the next block.
        """
        hidden, residual = add_norm(self.norm, hidden_states, residual, self.residual_in_fp32)
        hidden = self.mixer(hidden, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden, residual = add_norm(self.norm2, hidden, residual, self.residual_in_fp32)
            hidden = self.mlp(hidden)
        return hidden, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """What the mixer allocates."""
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


def add_norm(
    norm: nn.Module, hidden: Tensor, residual: Tensor | None, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """The normalised sum of hidden and residual, and the sum."""
    module: Any = norm
    if isinstance(norm, (RMSNorm, nn.LayerNorm)):
        y, residual = layer_norm_fn(
            hidden, module.weight, module.bias, residual, eps=module.eps, prenorm=True,
            residual_in_fp32=residual_in_fp32, is_rms_norm=isinstance(norm, RMSNorm),
        )  # fmt: skip
        assert residual is not None
        return y, residual
    total = hidden if residual is None else hidden + residual
    y = module(total.to(module.weight.dtype))
    return y, total.float() if residual_in_fp32 else total
