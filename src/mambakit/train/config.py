"""What a training run is: one frozen dataclass, from keywords, a dict or a TOML file. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mambakit.errors import ConfigError
from mambakit.files import atomic_write
from mambakit.models.config import MambaConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    # Newer Pythons, which have no need of it, check the types for this one too.
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

Precision = Literal["float32", "bfloat16"]
NonFinite = Literal["stop", "skip"]
LoraTarget = Literal["in_proj", "x_proj", "dt_proj", "out_proj"]

_COUNT = 2**31 - 1
_INTEGER_RANGES = {
    "steps": (1, _COUNT),
    "batch_size": (1, 2**20),
    "accumulation": (1, 2**20),
    "seqlen": (1, 2**24),
    "seed": (0, _COUNT),
    "log_every": (1, _COUNT),
    "valid_every": (0, _COUNT),
    "valid_tokens": (0, 2**40),
    "save_every": (1, _COUNT),
    "keep": (1, 2**20),
    "lora_rank": (1, 2**16),
}
_NUMBER_RANGES = {
    "lr": (1e-12, 10.0),
    "min_lr": (0.0, 10.0),
    "warmup": (0.0, 1.0),
    "weight_decay": (0.0, 10.0),
    "grad_clip": (1e-12, math.inf),
    "lora_alpha": (1e-6, 1e6),
    "lora_dropout": (0.0, 0.99),
}
_SWITCHES = ("documents", "recomputation", "activation_checkpointing", "cuda_graph", "lora")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run, complete: the same config and data give the same weights."""

    data: Path
    """Folder made by `mambakit prepare`."""
    out: Path
    """Run folder: checkpoints, config.toml, log.jsonl, TensorBoard events and loss.png go here."""
    model: MambaConfig = field(default_factory=MambaConfig)
    """Shape of the model."""
    init_from: str | None = None
    """Checkpoint, run folder (its last checkpoint is taken) or hub id to start from; default: random weights."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch_size: int = 8
    """Sequences per device in one forward and backward pass."""
    accumulation: int = 1
    """Passes whose gradients are averaged into one optimizer step."""
    seqlen: int = 512
    """Tokens per sequence."""
    documents: bool = False
    """Start the state afresh at every document boundary inside a sequence."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""

    lr: float = 1e-3
    """Peak learning rate, reached at the end of the warm-up."""
    min_lr: float = 1e-5
    """Learning rate of the last step, where the cosine ends."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's running means of the gradient and of its square."""
    weight_decay: float = 0.1
    """AdamW's weight decay; biases, norms, A_log, D and dt_bias are left out."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; inf turns clipping off."""
    non_finite: NonFinite = "stop"
    """What to do with a step whose loss or gradient is NaN or infinite."""

    lora: bool = False
    """Train adapters of low rank (LoRA), and leave the weights of init_from as they are."""
    lora_rank: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """Their factor is lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that are left out in training."""
    lora_targets: tuple[LoraTarget, ...] = get_args(LoraTarget)
    """The layers of each block that have an adapter."""

    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""
    precision: Precision = "float32"
    """bfloat16 runs the matmuls in bfloat16 (autocast); weights and optimizer stay float32."""
    recomputation: bool = True
    """On a GPU, make x and dt of each mixer again in the backward pass instead of keeping them: less memory, 2 % more
    time."""
    activation_checkpointing: bool = False
    """Keep only each block's input and recompute the rest backward: less memory, more time."""
    cuda_graph: bool = True
    """On one GPU, run each step as one CUDA graph, so that the GPU does not wait for Python. Not with
    both --lora-dropout and --activation-checkpointing."""

    log_every: int = 10
    """Steps between two lines of the log."""
    valid_every: int = 200
    """Steps between two validations; 0 validates only at the end."""
    valid_tokens: int = 262_144
    """Most tokens of the validation split that one validation reads; 0 reads them all."""
    save_every: int = 500
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints to keep; older ones are removed."""

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            is_path = isinstance(getattr(self, name), (str, Path))
            self._require(name, is_path, "the path of a folder")
            object.__setattr__(self, name, Path(getattr(self, name)))
        self._require("model", isinstance(self.model, MambaConfig), "a MambaConfig")
        for name, (low, high) in _INTEGER_RANGES.items():
            is_valid = _is_integer(getattr(self, name)) and low <= getattr(self, name) <= high
            self._require(name, is_valid, f"an integer from {low} to {high}")
        for name, (lowest, highest) in _NUMBER_RANGES.items():
            is_valid = _is_number(getattr(self, name)) and lowest <= getattr(self, name) <= highest
            self._require(name, is_valid, f"a number from {lowest:g} to {highest:g}")
        for name in _SWITCHES:
            self._require(name, isinstance(getattr(self, name), bool), "true or false")
        for name, choices in (
            ("precision", get_args(Precision)),
            ("non_finite", get_args(NonFinite)),
        ):
            self._require(name, getattr(self, name) in choices, f"one of {choices}")
        self._require("device", isinstance(self.device, str), "auto, cpu, cuda or cuda:N")
        self._require("min_lr", self.min_lr <= self.lr, f"at most lr = {self.lr:g}")
        is_name = self.init_from is None or isinstance(self.init_from, str)
        self._require("init_from", is_name, "a folder or hub id")
        self._require("betas", _are_betas(self.betas), "two numbers from 0 to below 1")
        object.__setattr__(self, "betas", tuple(self.betas))
        self._check_lora()

    def _check_lora(self) -> None:
        names = get_args(LoraTarget)
        is_valid = _is_subset(self.lora_targets, names)
        self._require("lora_targets", is_valid, f"a list of some out of {names}")
        # Other orders mean the same adapters.
        object.__setattr__(self, "lora_targets", tuple(n for n in names if n in self.lora_targets))
        if self.lora and self.init_from is None:
            raise ConfigError(
                "training config: lora has no weights to adapt; name a checkpoint with init_from "
                "(--init-from)"
            )
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if option.name.startswith("lora_") and not self.lora and value != option.default:
                raise ConfigError(
                    f"training config: {option.name} is {value!r}, but lora is off; "
                    "set lora = true (--lora)"
                )

    def _require(self, name: str, is_valid: bool, wanted: str) -> None:
        if not is_valid:
            raise ConfigError(f"training config: {name} is {getattr(self, name)!r}, not {wanted}")

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up, rounded up."""
        return math.ceil(self.warmup * self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON and TOML can hold; `from_dict` is the inverse."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **values,
            "data": str(self.data),
            "out": str(self.out),
            "betas": list(self.betas),
            "lora_targets": list(self.lora_targets),
            "model": self.model.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Make a config from field names and values, `model` being such a dict itself.

        Raises:
            ConfigError: A key is not a field, a path is missing, or a value is outside its range.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = (
                    f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(names)}"
                )
                raise ConfigError(f"training config: unknown field {key!r}; {hint}")
        for name in ("data", "out"):
            if name not in values:
                raise ConfigError(f"training config: {name} is missing; give the path of a folder")
        model = values.get("model", {})
        if not isinstance(model, Mapping):
            raise ConfigError(f"training config: model is {model!r}, not a table of model fields")
        return cls(**{**values, "model": MambaConfig.from_dict(model)})


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file as a dict, as `TrainConfig.from_dict` takes it.

    Raises:
        ConfigError: The file is missing or is not TOML.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # Of TOML and of UTF-8 alike.
        raise ConfigError(f"config file {path} is not TOML: {error}") from error
    return values


def write_toml(config: TrainConfig, path: Path) -> None:
    """Write a config as a TOML file that `read_toml` and `mambakit train --config` read back."""
    write_tables(config.to_dict(), path)


def write_tables(values: Mapping[str, Any], path: Path) -> None:
    """Write plain values, and tables of such, as a TOML file that `read_toml` reads back."""
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    lines = _entries({key: value for key, value in values.items() if key not in tables})
    for name, table in tables.items():
        lines += ["", f"[{name}]", *_entries(table)]
    with atomic_write(path) as partial:
        partial.write_text("\n".join(lines).lstrip() + "\n", encoding="utf-8")


def _entries(values: Mapping[str, Any]) -> list[str]:
    """Lines of a table; TOML has no null, so None is what is left out."""
    return [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]


def _toml(value: Any) -> str:
    # JSON's notation is TOML's too for all that a config holds, but for infinity.
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_betas(values: Any) -> bool:
    is_pair = isinstance(values, (tuple, list)) and len(values) == 2
    return is_pair and all(_is_number(value) and 0 <= value < 1 for value in values)


def _is_subset(values: Any, names: Sequence[str]) -> bool:
    is_list = isinstance(values, (tuple, list)) and len(values) > 0
    return is_list and all(value in names for value in values)
