"""Which tensors the kernels of a decoding step take: a question that needs no GPU."""

from __future__ import annotations

import pytest
import torch
from zero_layers import zero_layer

from mambakit.ops.cuda import many_rows_step, model_step, one_kernel_step
from mambakit.ops.cuda.model_step import Kernels, ModelStep, kernels_of, suitable
from mambakit.ops.model_layer import Layer

BATCH, D_MODEL, D_INNER, RANK = 2, 24, 48, 2


def make_layer(dtype: torch.dtype = torch.bfloat16, d_state: int = 16) -> Layer:
    return zero_layer(dtype, D_MODEL, BATCH, RANK, d_state)


def is_suitable(layer: Layer, **others: torch.Tensor) -> bool:
    dtype = layer.in_proj.dtype
    tensors = {
        "embedding": torch.zeros(10, D_MODEL, dtype=dtype),
        "norm_f": torch.zeros(D_MODEL, dtype=dtype),
        "head": torch.zeros(10, D_MODEL, dtype=dtype),
        **others,
    }
    return suitable([make_layer(dtype), layer], [*tensors.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_state", [1, 5, 16, 31, 96, 128])
def test_plain_layers(dtype: torch.dtype, d_state: int) -> None:
    assert is_suitable(make_layer(dtype, d_state))


@pytest.mark.parametrize("d_state", [33, 130, 132])
def test_states_that_a_warp_does_not_hold(d_state: int) -> None:
    assert not is_suitable(make_layer(d_state=d_state))


TENSORS = [name for name, tensor in make_layer()._asdict().items() if tensor is not None]


@pytest.mark.parametrize("name", TENSORS)
def test_another_dtype(name: str) -> None:
    layer = make_layer()
    other = torch.float32 if getattr(layer, name).dtype == torch.bfloat16 else torch.bfloat16
    assert not is_suitable(layer._replace(**{name: getattr(layer, name).to(other)}))


@pytest.mark.parametrize("name", ["in_proj", "conv", "x_proj", "dt_proj", "A_log", "out_proj"])
def test_a_weight_that_is_a_transposed_one(name: str) -> None:
    layer = make_layer()
    weight = getattr(layer, name).transpose(0, -1).contiguous().transpose(0, -1)
    assert not is_suitable(layer._replace(**{name: weight}))


@pytest.mark.parametrize("name", ["embedding", "norm_f", "head"])
def test_another_dtype_around_the_layers(name: str) -> None:
    shape = (D_MODEL,) if name == "norm_f" else (10, D_MODEL)
    assert not is_suitable(make_layer(), **{name: torch.zeros(shape)})


def test_float64_is_none_of_theirs() -> None:
    assert not is_suitable(make_layer(torch.float64))


def test_codes_are_none_of_theirs() -> None:
    layer = make_layer()
    codes = layer.in_proj.to(torch.int8)
    assert not is_suitable(layer._replace(in_proj=codes, in_scales=torch.ones(2 * D_INNER, 1)))


def test_states_in_a_pool() -> None:
    """Any strides of the convolution's state; neighbouring states of the scan side by side."""
    layer = make_layer()
    taps_outside = layer.conv_state.transpose(1, 2).contiguous().transpose(1, 2)
    pool = torch.zeros(7, 3, D_INNER, 16)
    assert is_suitable(layer._replace(conv_state=taps_outside, ssm_state=pool[:BATCH, 1]))
    states_outside = layer.ssm_state.transpose(1, 2).contiguous().transpose(1, 2)
    assert not is_suitable(layer._replace(ssm_state=states_outside))


@pytest.mark.parametrize("has_one", [True, False])
@pytest.mark.parametrize("has_tensor_cores", [True, False])
def test_what_does_a_step_of_so_many_rows(
    has_one: bool, has_tensor_cores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def most(rows: int) -> object:
        return lambda *arguments: has_one and arguments[-1] <= rows

    monkeypatch.setattr(one_kernel_step, "suitable", most(8))
    monkeypatch.setattr(many_rows_step, "suitable", most(128))
    monkeypatch.setattr(
        model_step, "are_for_tensor_cores", lambda _, rows: has_tensor_cores and 5 <= rows <= 64
    )
    few = Kernels.ONE if has_one else Kernels.FEW_ROWS
    some = Kernels.TENSOR_CORES if has_tensor_cores else Kernels.FEW_ROWS
    many = Kernels.TENSOR_CORES if has_tensor_cores else Kernels.LIBRARY
    expected = {1: few, 4: few, 5: few if has_one else some, 8: few if has_one else some}
    expected |= dict.fromkeys((9, 64), Kernels.ONE_OF_MANY_ROWS if has_one else many)
    expected |= dict.fromkeys((65, 128), Kernels.ONE_OF_MANY_ROWS if has_one else Kernels.LIBRARY)
    expected |= {129: Kernels.LIBRARY}
    assert {rows: kernels_of([make_layer()], [], rows) for rows in expected} == expected

    step = ModelStep([make_layer()], [], [])
    assert step.gives_same_bits(1, 4)
    assert step.gives_same_bits(1, 8) == (has_one or not has_tensor_cores)
    assert step.gives_same_bits(9, 64) == (has_one or has_tensor_cores)
    assert step.gives_same_bits(9, 128) == has_one
    assert step.gives_same_bits(8, 9) == (has_tensor_cores and not has_one)
    assert not step.gives_same_bits(129, 130)
    assert step.gives_same_bits(130, 130)
