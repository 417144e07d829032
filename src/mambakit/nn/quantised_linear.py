"""Linear layers and an embedding whose weights are integer codes with scales."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambakit.ops.quantisation import QuantisedWeight, dequantise
from mambakit.ops.quantised_linear import quantised_linear


class QuantisedLinear(nn.Module):
    """y = x weight^T + bias, in the place of `Linear`; the weight cannot be trained.

    The scales stay bfloat16 under `.to(dtype)`: other dtypes would only take more memory.

    Args:
        weight: From `quantise_weight`, (O, K).
        bias: (O,); default: none.
    """

    codes: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: QuantisedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.columns, weight.codes.shape[0]
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.bias = bias

    @property
    def matrix(self) -> QuantisedWeight:
        """The weight, (O, K)."""
        return QuantisedWeight(self.codes, self.scales, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) to (..., O)."""
        return quantised_linear(input, self.matrix, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for print."""
        bits, group_size = self.matrix.bits, self.matrix.group_size
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, bits={bits}, group_size={group_size}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        def keep_dtype(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return tensor.to(out.device) if tensor is self.scales else out

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


class QuantisedDtProjection(QuantisedLinear):
    """In the place of `DtProjection`: the scan adds the bias, not this layer."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., R) to (..., D), without the bias."""
        return quantised_linear(input, self.matrix)


class QuantisedEmbedding(nn.Module):
    """Rows of a quantised matrix; the head may be the same module, and then is stored once.

    Args:
        table: A row for each token id, (V, M).
        dtype: Of the embeddings; `.to(dtype)` changes it.
    """

    def __init__(self, table: QuantisedLinear, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = table
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) to (..., M)."""
        ids = tokens.flatten()
        codes, scales, columns = self.table.matrix
        rows = QuantisedWeight(codes.index_select(0, ids), scales.index_select(0, ids), columns)
        return dequantise(rows, self.dtype).view(*tokens.shape, columns)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedEmbedding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self
