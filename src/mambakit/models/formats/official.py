"""The format of the authors' code (`mamba_ssm`): config.json and pytorch_model.bin.

Our tensors have its names. Its config has no field for the epsilon of the norms, which is 1e-5.
"""

from __future__ import annotations

from typing import Any

from mambakit.errors import ConfigError
from mambakit.models.config import MambaConfig
from mambakit.models.formats.layout import (
    PICKLE,
    REAL_AND_SELECTIVE,
    Description,
    Layout,
    require,
    require_fields,
)

NAME = "official"
FIELDS = ("d_model", "n_layer")
OPTIONAL_FIELDS = (
    "vocab_size", "pad_vocab_size_multiple", "residual_in_fp32", "tie_embeddings",
)  # fmt: skip
MIXER_FIELDS = (
    "d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale",
    "dt_init_floor", "conv_bias", "bias",
)  # fmt: skip
"""Arguments of the mixer, in "ssm_cfg"; those left out have the same defaults as here."""
ONLY = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}}
ONLY_MIXER = {"layer": "Mamba1"}
WITHOUT_EFFECT = ("use_fast_path",)


def _recognises(description: Description) -> bool:
    return "model_type" not in description and {*FIELDS} <= description.keys()


def _read(description: Description) -> MambaConfig:
    mixer = description.get("ssm_cfg", {})
    if not isinstance(mixer, dict):
        raise ConfigError(f"ssm_cfg is {mixer!r}, wanted an object")
    require(description, ONLY, "other layers than Mamba's are not known here")
    require(mixer, ONLY_MIXER, "other mixers than Mamba-1 are not known here")
    unknown = [key for key in mixer if key not in (*MIXER_FIELDS, *ONLY_MIXER, *WITHOUT_EFFECT)]
    if unknown:
        raise ConfigError(f"ssm_cfg has the unknown {', '.join(unknown)}")
    values = {key: description[key] for key in (*FIELDS, *OPTIONAL_FIELDS) if key in description}
    return MambaConfig.from_dict({**values, **{k: mixer[k] for k in MIXER_FIELDS if k in mixer}})


def _describe(config: MambaConfig, eos_id: int | None) -> dict[str, Any]:
    only = {"norm_epsilon": 1e-5, "mixer_norm_epsilon": None}
    require_fields(config, {**REAL_AND_SELECTIVE, **only}, NAME)
    return {
        **{name: getattr(config, name) for name in (*FIELDS, *OPTIONAL_FIELDS)},
        "ssm_cfg": {"layer": "Mamba1", **{name: getattr(config, name) for name in MIXER_FIELDS}},
        "rms_norm": True,
        "fused_add_norm": True,
    }


LAYOUT = Layout(
    name=NAME,
    recognises=_recognises,
    read=_read,
    describe=_describe,
    weights=PICKLE,
    stores_tied_head=True,
)
