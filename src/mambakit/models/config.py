"""Every size and switch of a Mamba language model, checked on construction. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from mambakit.errors import ConfigError

SelectiveName = Literal["dt", "B", "C"]
AInit = Literal["s4d-real", "constant", "random", "s4d-lin"]
DtInit = Literal["random", "constant"]
BlockName = Literal["mamba", "h3", "ungated"]

_INTEGER_RANGES = {
    "d_model": (1, 2**16),
    "n_layer": (1, 2**12),
    "vocab_size": (1, 2**24),
    "pad_vocab_size_multiple": (1, 2**16),
    "d_state": (1, 2**12),
    "d_conv": (1, 2**8),
    "expand": (1, 2**6),
}
_POSITIVE_NUMBERS = ("dt_min", "dt_max", "dt_scale", "dt_init_floor", "norm_epsilon")
_SWITCHES = ("conv_bias", "bias", "tie_embeddings", "residual_in_fp32")
_MAX_PARAMETERS = 10**12


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Sizes, initialisation and selection switches of a Mamba language model.

    The defaults are the released 130M model. Field names are those of the paper's code
    (Gu & Dao, arXiv 2312.00752), so published settings carry over.

    Raises:
        ConfigError: A field has a value outside its range.
    """

    d_model: int = 768
    """Width of the residual stream (M)."""
    n_layer: int = 24
    """Number of Mamba blocks."""
    vocab_size: int = 50277
    """Number of token ids."""
    pad_vocab_size_multiple: int = 8
    """The embedding has vocab_size rows rounded up to a multiple of this."""
    d_state: int = 16
    """State size of each channel (N)."""
    d_conv: int = 4
    """Width of the causal convolution (W)."""
    expand: int = 2
    """Inner channels per channel of the residual stream: D = expand * M."""
    dt_rank: int | Literal["auto"] = "auto"
    """Rank of the projection that makes dt (R); "auto" is ceil(M / 16)."""
    dt_min: float = 0.001
    """Smallest initial time step."""
    dt_max: float = 0.1
    """Largest initial time step."""
    dt_init: DtInit = "random"
    """Initial dt_proj.weight: uniform in +-dt_scale / sqrt(R), or constant at its upper end."""
    dt_scale: float = 1.0
    """Factor of the initial dt_proj.weight."""
    dt_init_floor: float = 1e-4
    """Initial time steps are not smaller than this."""
    conv_bias: bool = True
    """Bias of the convolution."""
    bias: bool = False
    """Bias of in_proj and out_proj."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    mixer_norm_epsilon: float | None = None
    """With it dt, B and C are each scaled to a mean square of one, as in FalconMamba; added to that."""
    tie_embeddings: bool = True
    """Whether the output head shares the weight of the embedding."""
    residual_in_fp32: bool = True
    """Whether the residual stream stays float32 in a half-precision model."""
    selective: tuple[SelectiveName, ...] = ("dt", "B", "C")
    """Which of dt, B and C depend on the input; the others are plain parameters (Table 7)."""
    A_init: AInit = "s4d-real"
    """A_n at the start: s4d-real -(n+1), constant -1/2, random -exp(N(0, 1)), s4d-lin -1/2 + ni.

    s4d-lin makes A, B, C and the state complex (Table 8).
    """
    block: BlockName = "mamba"
    """What stands around the scan: Mamba's block, H3's, or Mamba's without its gate (Tables 1 and 6)."""

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGER_RANGES.items():
            is_valid = _is_integer(getattr(self, name), low, high)
            self._require(name, is_valid, f"an integer from {low} to {high}")
        for name in _POSITIVE_NUMBERS:
            self._require(name, _is_positive_number(getattr(self, name)), "a positive number")
        is_valid = self.mixer_norm_epsilon is None or _is_positive_number(self.mixer_norm_epsilon)
        self._require("mixer_norm_epsilon", is_valid, "a positive number or None")
        for name in _SWITCHES:
            self._require(name, isinstance(getattr(self, name), bool), "true or false")
        for name, kind in (("dt_init", DtInit), ("A_init", AInit), ("block", BlockName)):
            choices = get_args(kind)
            self._require(name, getattr(self, name) in choices, f"one of {choices}")
        self._require("dt_min", self.dt_min <= self.dt_max, f"at most dt_max = {self.dt_max}")
        is_valid = self.dt_rank == "auto" or _is_integer(self.dt_rank, 1, self.d_inner)
        self._require("dt_rank", is_valid, f'"auto" or an integer from 1 to {self.d_inner}')
        names = get_args(SelectiveName)
        self._require("selective", _is_subset(self.selective, names), f"a list out of {names}")
        # Lists and other orders mean the same model.
        object.__setattr__(self, "selective", tuple(n for n in names if n in self.selective))
        if (count := self.num_parameters()) > _MAX_PARAMETERS:
            raise ConfigError(
                f"model config: n_layer={self.n_layer} and d_model={self.d_model} make {count:.1e} "
                f"parameters, but the limit is {_MAX_PARAMETERS:.0e}; choose smaller sizes"
            )

    def _require(self, name: str, is_valid: bool, wanted: str) -> None:
        if not is_valid:
            raise ConfigError(f"model config: {name} is {getattr(self, name)!r}, not {wanted}")

    @property
    def d_inner(self) -> int:
        """Inner channels, D = expand * M."""
        return self.expand * self.d_model

    @property
    def resolved_dt_rank(self) -> int:
        """Rank of the dt projection, with "auto" worked out."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of pad_vocab_size_multiple."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    @property
    def is_complex(self) -> bool:
        """Whether A, B, C and the state are complex."""
        return self.A_init == "s4d-lin"

    def num_parameters(self) -> int:
        """Number of parameters in closed form; a tied head counts once."""
        d_inner, d_model, rank = self.d_inner, self.d_model, self.resolved_dt_rank
        state_numbers = self.d_state * (2 if self.is_complex else 1)
        streams = {"mamba": 2, "h3": 3, "ungated": 1}[self.block] * d_inner
        in_proj = d_model * streams + (streams if self.bias else 0)
        conv = d_inner * self.d_conv + (d_inner if self.conv_bias else 0)
        dt = 2 * d_inner * rank + d_inner if "dt" in self.selective else d_inner
        # A selective B or C is a projection from D to N, a fixed one a (D, N) parameter: the same.
        A_B_C = 3 * d_inner * state_numbers
        skip = d_inner
        out_proj = d_inner * d_model + (d_model if self.bias else 0)
        layer = d_model + in_proj + conv + dt + A_B_C + skip + out_proj
        embeddings = self.padded_vocab_size * d_model * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layer * layer + d_model

    def with_vocabulary(self, vocab_size: int) -> MambaConfig:
        """The same sizes, of whose ids only the first `vocab_size` stand for tokens.

        Raises:
            ConfigError: The embedding has fewer rows.
        """
        rows = self.padded_vocab_size
        if not 1 <= vocab_size <= rows:
            raise ConfigError(f"model config: vocab_size is {vocab_size}, not from 1 to {rows}")
        multiples = range(rows - vocab_size + 1, rows + 1)
        multiple = next(number for number in multiples if rows % number == 0)
        return dataclasses.replace(self, vocab_size=vocab_size, pad_vocab_size_multiple=multiple)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold; `from_dict` is the inverse."""
        return {**dataclasses.asdict(self), "selective": list(self.selective)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MambaConfig:
        """Make a config from field names and values; fields left out keep their defaults.

        Raises:
            ConfigError: A key is not a field, or a value is outside its range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = (
                    f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(names)}"
                )
                raise ConfigError(f"model config: unknown field {key!r}; {hint}")
        return cls(**values)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> MambaConfig:
        """Read the config of a checkpoint, from a folder or the hub, as `load_model` takes it.

        Raises:
            CheckpointError: There is none, or it cannot be read or understood.
        """
        from mambakit.models.checkpoint import read_config
        from mambakit.models.hub import locate

        return read_config(locate(source))


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_positive_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def _is_subset(values: Any, names: Sequence[str]) -> bool:
    is_list = isinstance(values, (tuple, list))
    return is_list and all(value in names for value in values) and len(set(values)) == len(values)
