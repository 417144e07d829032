"""The format of transformers, for its models `mamba` and `falcon_mamba`: config.json, safetensors.

FalconMamba is Mamba with norms of dt, B and C. The vocabulary has as many ids as the embedding has
rows: how many of them are padding is not said.
"""

from __future__ import annotations

from typing import Any

from mambakit.errors import ConfigError
from mambakit.models.config import MambaConfig
from mambakit.models.formats.layout import (
    REAL_AND_SELECTIVE,
    Description,
    Layout,
    require,
    require_fields,
)

NAME = "huggingface"
TENSORS = {"backbone.embedding.": "backbone.embeddings."}
FIELDS = {"d_model": "hidden_size", "n_layer": "num_hidden_layers", "vocab_size": "vocab_size"}
OPTIONAL_FIELDS = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "dt_rank": "time_step_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
    "dt_init_floor": "time_step_floor",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "norm_epsilon": "layer_norm_epsilon",
    "residual_in_fp32": "residual_in_fp32",
    "tie_embeddings": "tie_word_embeddings",
}
"""Ours and theirs; those left out have the same defaults as here."""
ONLY = {"rms_norm": True, "hidden_act": "silu"}
ARCHITECTURES = {"mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM"}
FALCON_EPSILON = 1e-6
"""Of FalconMamba's norms of dt, B and C, where "mixer_rms_eps" does not say another."""


def _recognises(description: Description) -> bool:
    return description.get("model_type") in ARCHITECTURES


def _read(description: Description) -> MambaConfig:
    missing = [theirs for theirs in FIELDS.values() if theirs not in description]
    if missing:
        raise ConfigError(f"has no {', '.join(missing)}")
    require(description, ONLY, "another kind of model is not known here")
    names = {**FIELDS, **OPTIONAL_FIELDS}
    values = {ours: description[theirs] for ours, theirs in names.items() if theirs in description}
    if description["model_type"] == "falcon_mamba":
        values["mixer_norm_epsilon"] = description.get("mixer_rms_eps", FALCON_EPSILON)
    values["expand"] = _expand(description)
    return MambaConfig.from_dict({**values, "pad_vocab_size_multiple": 1})


def _expand(description: Description) -> Any:
    """Inner channels per channel of the residual stream; "intermediate_size" wins over "expand"."""
    expand, d_model = description.get("expand", 2), description["hidden_size"]
    d_inner = description.get("intermediate_size")
    if not isinstance(d_inner, int) or not isinstance(d_model, int) or d_model < 1:
        return expand
    if d_inner % d_model:
        raise ConfigError(f"intermediate_size is {d_inner}, wanted a multiple of {d_model}")
    return d_inner // d_model


def _describe(config: MambaConfig, eos_id: int | None) -> dict[str, Any]:
    require_fields(config, REAL_AND_SELECTIVE, NAME)
    kind = "mamba" if config.mixer_norm_epsilon is None else "falcon_mamba"
    description = {theirs: getattr(config, ours) for ours, theirs in OPTIONAL_FIELDS.items()}
    if config.mixer_norm_epsilon is not None:
        description["mixer_rms_eps"] = config.mixer_norm_epsilon
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "vocab_size": config.padded_vocab_size,
        **description,
        "expand": config.expand,
        "intermediate_size": config.d_inner,
        "time_step_rank": config.resolved_dt_rank,
        "hidden_act": "silu",
        # Left out, they would be 0, an id like any other.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eos_id),
    }


LAYOUT = Layout(
    name=NAME, recognises=_recognises, read=_read, describe=_describe, names=TENSORS
)  # fmt: skip
