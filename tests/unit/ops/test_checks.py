"""Every wrong argument is named, with what it got and what was wanted."""

import re
from typing import Any

import pytest
import torch

from mambakit.errors import ArgumentError, DtypeError, ShapeError
from mambakit.ops import (
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_step,
    linear_cross_entropy,
    rms_norm,
    selective_scan,
    selective_scan_step,
)


def scan_inputs() -> dict[str, Any]:
    return {
        "x": torch.ones(2, 5, 6), "dt": torch.ones(2, 5, 6), "A": -torch.ones(6, 3),
        "B": torch.ones(2, 5, 3), "C": torch.ones(2, 5, 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.ones(5, 6), "x: got shape (5, 6), wanted (B, L, D)"),
        ("dt", torch.ones(2, 4, 6), "dt: got shape (2, 4, 6), wanted (B, L, D) = (2, 5, 6)"),
        ("A", torch.ones(5, 3), "A: got shape (5, 3), wanted (D, N) = (6, 3)"),
        ("A", torch.ones(6, 0), "A: got shape (6, 0), wanted (D, N) = (6, 1)"),
        ("B", torch.ones(2, 5, 4), "B: got shape (2, 5, 4), wanted (D, N) or (B, L, N)"),
        ("C", torch.ones(2, 5, 4, 3), "C: got 4 groups, wanted a divisor of the 6 channels"),
        ("D", torch.ones(5), "D: got shape (5,), wanted (D,) = (6,)"),
        ("z", torch.ones(2, 5), "z: got shape (2, 5), wanted (B, L, D)"),
        ("dt_bias", torch.ones(1), "dt_bias: got shape (1,), wanted (D,)"),
        ("initial_state", torch.ones(2, 6, 2), "initial_state: got shape (2, 6, 2), wanted (B, D, N)"),
        ("seq_idx", torch.ones(2, 4).long(), "seq_idx: got shape (2, 4), wanted (B, L)"),
    ],
)  # fmt: skip
def test_scan_shapes(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(message)):
        selective_scan(**{**scan_inputs(), name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "x",
            torch.ones(2, 5, 6).long(),
            "x: got dtype torch.int64, wanted a floating point dtype",
        ),
        ("B", torch.ones(2, 5, 3).cfloat(), "B: got dtype torch.complex64 with real A"),
        ("seq_idx", torch.ones(2, 5), "seq_idx: got dtype torch.float32, wanted int32 or int64"),
    ],
)
def test_scan_dtypes(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(DtypeError, match=re.escape(message)):
        selective_scan(**{**scan_inputs(), name: value})


def test_scan_devices() -> None:
    with pytest.raises(ArgumentError, match="dt: is on meta, wanted cpu like x"):
        selective_scan(**{**scan_inputs(), "dt": torch.ones(2, 5, 6, device="meta")})


def test_scan_step() -> None:
    now = {k: v[:, 0] if v.ndim == 3 else v for k, v in scan_inputs().items()}
    state = torch.zeros(2, 6, 3)
    with pytest.raises(
        DtypeError, match="ssm_state: got dtype torch.float64, wanted torch.float32"
    ):
        selective_scan_step(state.double(), **now)
    with pytest.raises(
        ShapeError, match=re.escape("B: got shape (6, 3), wanted (B, N) or (B, G, N)")
    ):
        selective_scan_step(state, **{**now, "B": torch.ones(6, 3)})
    with pytest.raises(ArgumentError, match=r"has no gradient; call it under torch.no_grad\(\)"):
        selective_scan_step(state, **{**now, "A": now["A"].requires_grad_()})
    with torch.no_grad():
        selective_scan_step(state, **now)
    assert state.abs().sum() > 0


def test_convolution() -> None:
    x, weight = torch.ones(2, 5, 6), torch.ones(6, 4)
    with pytest.raises(ShapeError, match=re.escape("weight: got shape (5, 4), wanted (D, W)")):
        causal_conv1d(x, weight[:5])
    with pytest.raises(ArgumentError, match="activation: got 'relu', wanted None or 'silu'"):
        causal_conv1d(x, weight, activation="relu")
    with pytest.raises(ShapeError, match="initial_state: got shape"):
        causal_conv1d(x, weight, initial_state=torch.ones(2, 6, 4))
    with pytest.raises(DtypeError, match="conv_state: got dtype torch.bfloat16"):
        causal_conv1d_step(torch.ones(2, 6, 3).bfloat16(), x[:, 0], weight)
    with pytest.raises(ShapeError, match="conv_state: got shape"):
        causal_conv1d_step(torch.ones(2, 6, 4), x[:, 0], weight)


def test_norm_and_loss() -> None:
    x = torch.ones(2, 6)
    with pytest.raises(ShapeError, match=re.escape("weight: got shape (5,), wanted (M,) = (6,)")):
        rms_norm(x, torch.ones(5))
    with pytest.raises(ShapeError, match="residual: got shape"):
        add_rms_norm(x, x[:1], torch.ones(6))
    with pytest.raises(ShapeError, match="hidden: got shape"):
        linear_cross_entropy(x, torch.ones(9, 5), torch.zeros(2).long())
    for wrong in (9, -1):
        with pytest.raises(
            ArgumentError, match=f"targets: got class {wrong}, wanted 0 <= class < 9"
        ):
            linear_cross_entropy(x, torch.ones(9, 6), torch.tensor([0, wrong]))
