"""Every size of the Transformer that Mamba is compared with. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mambakit.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a "Transformer++" language model (Gu & Dao 2023, section 4.2.1 and Table 12).

    The defaults are the model of 125M parameters, with the vocabulary of the released Mamba models.

    Raises:
        ConfigError: A field has a value outside its range.
    """

    d_model: int = 768
    """Width of the residual stream (M)."""
    n_layer: int = 12
    """Number of blocks, each attention and MLP."""
    n_head: int = 12
    """Heads of attention."""
    d_mlp: int | Literal["auto"] = "auto"
    """Inner width of the MLP; "auto" is 8/3 M, rounded up to a multiple of 128."""
    vocab_size: int = 50277
    """Number of token ids."""
    pad_vocab_size_multiple: int = 8
    """The embedding has vocab_size rows rounded up to a multiple of this."""
    rope_theta: float = 10000.0
    """Base of the wavelengths of the rotary position embedding."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    tie_embeddings: bool = True
    """Whether the output head shares the weight of the embedding."""
    residual_in_fp32: bool = True
    """Whether the residual stream stays float32 in a half-precision model."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "n_head", "vocab_size", "pad_vocab_size_multiple"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        is_even = self.d_model % (2 * self.n_head) == 0
        self._require("n_head", is_even, f"a divisor of d_model / 2 = {self.d_model / 2:g}")
        self._require("d_mlp", self.d_mlp == "auto" or self.d_mlp >= 1, '"auto" or at least 1')
        for name in ("rope_theta", "norm_epsilon"):
            self._require(name, getattr(self, name) > 0, "a positive number")

    def _require(self, name: str, is_valid: bool, wanted: str) -> None:
        if not is_valid:
            raise ConfigError(f"model config: {name} is {getattr(self, name)!r}, not {wanted}")

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_head

    @property
    def resolved_d_mlp(self) -> int:
        """Inner width of the MLP, with "auto" worked out."""
        return -(-8 * self.d_model // 384) * 128 if self.d_mlp == "auto" else self.d_mlp

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of pad_vocab_size_multiple."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    def num_parameters(self) -> int:
        """Number of parameters in closed form; a tied head counts once."""
        layer = 4 * self.d_model**2 + 3 * self.d_model * self.resolved_d_mlp + 2 * self.d_model
        embeddings = self.padded_vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layer * layer + self.d_model


TRANSFORMER_PRESETS = {
    "125m": TransformerConfig(d_model=768, n_layer=12, n_head=12),
    "350m": TransformerConfig(d_model=1024, n_layer=24, n_head=16),
    "760m": TransformerConfig(d_model=1536, n_layer=24, n_head=16),
    "1.3b": TransformerConfig(d_model=2048, n_layer=24, n_head=32),
    "2.7b": TransformerConfig(d_model=2560, n_layer=32, n_head=32),
}
"""GPT-3's shapes, as in the paper's Table 12: the counterparts of the Mamba presets, in their order."""
