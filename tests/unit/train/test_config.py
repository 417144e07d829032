from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mambakit.errors import ConfigError
from mambakit.models.config import MambaConfig
from mambakit.train.config import TrainConfig, read_toml, write_toml

PATHS = {"data": "tokens", "out": "run"}


def test_toml_round_trip_of_every_field(tmp_path: Path) -> None:
    config = TrainConfig(
        data=Path('földer "x"\\y'),
        out=Path("a\tb"),
        model=MambaConfig(d_model=24, selective=("dt",), A_init="random"),
        steps=7,
        betas=(0.5, 0.25),
        grad_clip=math.inf,
        documents=True,
        non_finite="skip",
        precision="bfloat16",
        init_from="runs/first",
        lora=True,
        lora_rank=4,
        lora_alpha=2.5,
        lora_dropout=0.25,
        lora_targets=("in_proj", "dt_proj"),
    )
    write_toml(config, tmp_path / "config.toml")
    assert TrainConfig.from_dict(read_toml(tmp_path / "config.toml")) == config
    assert "mixer_norm_epsilon" not in (tmp_path / "config.toml").read_text(encoding="utf-8")
    write_toml(TrainConfig(data=Path("a"), out=Path("b")), tmp_path / "config.toml")
    assert "init_from" not in (tmp_path / "config.toml").read_text(encoding="utf-8")


def test_toml_round_trip_of_a_field_that_may_be_left_out(tmp_path: Path) -> None:
    config = TrainConfig(data=Path("a"), out=Path("b"), model=MambaConfig(mixer_norm_epsilon=1e-6))
    write_toml(config, tmp_path / "config.toml")
    assert TrainConfig.from_dict(read_toml(tmp_path / "config.toml")) == config


def test_strings_are_paths_and_lists_are_pairs() -> None:
    config = TrainConfig(data="tokens", out="run", betas=[0.5, 0.6])  # type: ignore[arg-type]
    assert (config.data, config.out, config.betas) == (Path("tokens"), Path("run"), (0.5, 0.6))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("steps", 0, "an integer from 1 to 2147483647"),
        ("steps", 10.5, "an integer"),
        ("steps", True, "an integer"),
        ("batch_size", -1, "an integer from 1 to 1048576"),
        ("accumulation", 0, "an integer from 1"),
        ("seqlen", 2**40, "an integer from 1 to 16777216"),
        ("seed", -1, "an integer from 0"),
        ("keep", 0, "an integer from 1"),
        ("lr", 0.0, "a number from 1e-12 to 10"),
        ("lr", "fast", "a number"),
        ("lr", math.nan, "a number"),
        ("min_lr", 0.5, "at most lr = 0.001"),
        ("warmup", 1.5, "a number from 0 to 1"),
        ("betas", (0.9, 1.0), "two numbers from 0 to below 1"),
        ("betas", (0.9,), "two numbers"),
        ("weight_decay", -0.1, "a number from 0 to 10"),
        ("grad_clip", 0, "a number from 1e-12 to inf"),
        ("precision", "float16", "one of ('float32', 'bfloat16')"),
        ("non_finite", "ignore", "one of ('stop', 'skip')"),
        ("documents", 1, "true or false"),
        ("init_from", 3, "a folder or hub id"),
        ("lora", 1, "true or false"),
        ("lora_rank", 0, "an integer from 1 to 65536"),
        ("lora_alpha", 0, "a number from 1e-06 to 1e+06"),
        ("lora_dropout", 1.0, "a number from 0 to 0.99"),
        ("lora_targets", (), "a list of some out of ('in_proj', 'x_proj', 'dt_proj', 'out_proj')"),
        ("lora_targets", ("conv1d",), "a list of some out of"),
        ("data", None, "the path of a folder"),
        ("model", {"d_model": 16}, "a MambaConfig"),
    ],
)
def test_a_bad_value_names_field_value_and_rule(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{**PATHS, field: value})
    assert f"{field} is {value!r}, not {rule}" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": True}, "lora has no weights to adapt; name a checkpoint with init_from"),
        ({"lora_rank": 4}, "lora_rank is 4, but lora is off; set lora = true (--lora)"),
        (
            {"lora_targets": ["x_proj"], "init_from": "a"},
            "lora_targets is ('x_proj',), but lora is",
        ),
    ],
)
def test_options_of_adapters_that_have_no_effect(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**PATHS, **values)
    assert message in str(caught.value)


def test_the_order_of_layers_does_not_matter() -> None:
    values = {**PATHS, "lora": True, "init_from": "a"}
    config = TrainConfig(**values, lora_targets=["dt_proj", "in_proj"])  # type: ignore[arg-type]
    assert config.lora_targets == ("in_proj", "dt_proj")
    assert config == TrainConfig(**values, lora_targets=("in_proj", "dt_proj"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**PATHS, "stpes": 3}, "unknown field 'stpes'; did you mean 'steps'?"),
        (
            {**PATHS, "qqq": 3},
            "unknown field 'qqq'; the fields are data, out, model, init_from, steps",
        ),
        ({**PATHS, "model": {"d_modle": 3}}, "unknown field 'd_modle'; did you mean 'd_model'?"),
        ({**PATHS, "model": 3}, "model is 3, not a table of model fields"),
        ({"data": "tokens"}, "out is missing; give the path of a folder"),
    ],
)
def test_a_bad_dict_says_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(values)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["steps = = 3", b"\xff\xfe"])
def test_a_file_that_is_no_toml(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=r"run\.toml is not TOML"):
        read_toml(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        read_toml(tmp_path / "none.toml")


def test_warmup_is_rounded_up() -> None:
    assert TrainConfig(data="a", out="b", steps=25, warmup=0.1).warmup_steps == 3
    assert TrainConfig(data="a", out="b", steps=25, warmup=0).warmup_steps == 0


def test_configs_load_no_torch() -> None:
    code = "import sys, mambakit.train.config, mambakit.train; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
