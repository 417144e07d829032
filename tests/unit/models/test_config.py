from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mambakit.errors import ConfigError
from mambakit.models import PRESETS, MambaConfig, MambaLanguageModel, preset

PAPER = {"d_model": 1024, "n_layer": 48, "vocab_size": 50280}


@pytest.mark.parametrize(
    ("name", "millions"),
    [("130m", 129.1), ("370m", 371.5), ("790m", 793.2), ("1.4b", 1372.2), ("2.8b", 2768.3)],
)
def test_presets_have_the_published_sizes(name, millions):
    assert round(PRESETS[name].num_parameters() / 1e6, 1) == millions
    assert PRESETS[name].padded_vocab_size == 50280


@pytest.mark.parametrize(
    ("fields", "millions"),
    [
        ({"dt_rank": 1}, 359.1),
        ({"dt_rank": 2}, 359.3),
        ({"dt_rank": 8}, 360.5),
        ({"dt_rank": 64}, 371.5),
        ({"selective": ("B", "C")}, 358.9),
        ({"d_state": 1}, 367.1),
        ({"d_state": 4}, 368.0),
        ({"d_state": 16}, 371.5),
    ],
)
def test_tables_9_and_10(fields, millions):
    assert round(MambaConfig(**PAPER, **fields).num_parameters() / 1e6, 1) == millions


@pytest.mark.parametrize("block", ["mamba", "h3", "ungated"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_blocks_have_as_many_parameters_as_the_closed_form_says(block, bias):
    config = MambaConfig(d_model=12, n_layer=2, vocab_size=16, block=block, bias=bias)
    assert MambaLanguageModel(config).num_parameters() == config.num_parameters()


def test_derived_sizes():
    config = MambaConfig(d_model=100, vocab_size=257, expand=3)
    assert config.d_inner == 300
    assert config.resolved_dt_rank == 7
    assert config.padded_vocab_size == 264
    assert not config.is_complex
    assert MambaConfig(A_init="s4d-lin").is_complex


@pytest.mark.parametrize(
    ("rows", "vocab_size", "multiple"),
    [(50280, 50277, 4), (50280, 50280, 1), (56, 1, 56), (50287, 50280, 50287), (65024, 60000, 8128)],
)  # fmt: skip
def test_ids_that_stand_for_no_token(rows, vocab_size, multiple):
    config = MambaConfig(vocab_size=rows, pad_vocab_size_multiple=1).with_vocabulary(vocab_size)
    assert (config.vocab_size, config.padded_vocab_size) == (vocab_size, rows)
    assert config.pad_vocab_size_multiple == multiple
    for wrong in (0, rows + 1):
        with pytest.raises(ConfigError, match=f"vocab_size is {wrong}, not from 1 to {rows}"):
            config.with_vocabulary(wrong)


def test_dict_round_trip_through_json():
    config = MambaConfig(d_model=64, selective=("C", "dt"), dt_rank=3, A_init="constant")
    assert config.selective == ("dt", "C")
    assert MambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 0}, "d_model is 0, not an integer from 1 to 65536"),
        ({"d_model": 768.0}, "d_model is 768.0, not an integer"),
        ({"n_layer": True}, "n_layer is True, not an integer"),
        ({"n_layer": -1}, "n_layer is -1"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
        ({"dt_min": 0.2}, r"dt_min is 0\.2, not at most dt_max = 0\.1"),
        ({"dt_max": float("nan")}, "dt_max is nan, not a positive number"),
        ({"norm_epsilon": 0}, "norm_epsilon is 0, not a positive number"),
        ({"mixer_norm_epsilon": 0.0}, r"mixer_norm_epsilon is 0\.0, not a positive number or None"),
        ({"dt_rank": "big"}, "dt_rank is 'big', not \"auto\" or an integer from 1 to 1536"),
        ({"dt_rank": 1537}, "dt_rank is 1537"),
        ({"bias": 1}, "bias is 1, not true or false"),
        ({"A_init": "hippo"}, "A_init is 'hippo', not one of"),
        ({"block": "s4"}, "block is 's4', not one of"),
        ({"A_init": ["random"]}, "A_init is"),
        ({"selective": "dt"}, "selective is 'dt', not a list out of"),
        ({"selective": ("dt", "A")}, "selective is"),
        ({"selective": ("dt", "dt")}, "selective is"),
        ({"selective": ([],)}, "selective is"),
        (
            {"d_model": 65536, "n_layer": 4096},
            r"make 1\.1e\+14 parameters, but the limit is 1e\+12",
        ),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        MambaConfig(**fields)


def test_unknown_fields_and_presets_suggest_the_near_one():
    with pytest.raises(ConfigError, match="unknown field 'd_modl'; did you mean 'd_model'"):
        MambaConfig.from_dict({"d_modl": 3})
    with pytest.raises(ConfigError, match="unknown field 'xyz'; the fields are d_model, n_layer"):
        MambaConfig.from_dict({"xyz": 3})
    with pytest.raises(ConfigError, match=r"'1.5b'; did you mean '1\.4b'"):
        preset("1.5b")
    with pytest.raises(ConfigError, match="'giant'; presets: 130m, 370m"):
        preset("giant")
    assert preset("Mamba-1.4B") == PRESETS["1.4b"]


def test_configs_load_no_torch():
    code = "import sys, mambakit; mambakit.preset('130m'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
