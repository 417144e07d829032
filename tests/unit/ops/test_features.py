from __future__ import annotations

import pytest
import torch

from mambakit.errors import ConfigError
from mambakit.ops.cpu import features

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    def pretend(name: str, *found: str) -> None:
        monkeypatch.setattr(features.platform, "machine", lambda: name)
        monkeypatch.setattr(features, "features", lambda: frozenset(found))

    return pretend


def test_features_of_this_machine() -> None:
    assert all(isinstance(name, str) for name in features.features())
    assert features.features() is features.features()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("x86_64", ("avx2", "avx512f", "avx512bf16")),
        ("AMD64", ("avx512f", "amx-bf16")),
        ("x86_64", ("avx2", "avxneconvert")),
        ("aarch64", ("neon", "bf16")),
        ("arm64", ()),  # LLVM does not tell on a Mac.
    ],
)
def test_fast_bfloat16(machine, name: str, found: tuple[str, ...]) -> None:
    machine(name, *found)
    assert features.slow_bfloat16() is None
    features.check_bfloat16(CPU)


def test_bfloat16_that_is_only_no_faster(machine) -> None:
    machine("x86_64", "avx2", "avx512f")
    assert "not AVX512-BF16" in features.slow_bfloat16()
    features.check_bfloat16(CPU)


def test_hopeless_bfloat16(machine) -> None:
    machine("x86_64", "avx2", "fma")
    with pytest.raises(ConfigError, match="precision: got bfloat16, .* slower .*; use float32"):
        features.check_bfloat16(CPU)
    features.check_bfloat16(torch.device("cuda"))
