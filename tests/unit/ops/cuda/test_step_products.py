"""Which kernel multiplies: a question that needs no GPU."""

from __future__ import annotations

import pytest
import torch
from zero_layers import zero_layer

from mambakit.ops.cuda import step_products, tensor_core_products
from mambakit.ops.cuda.step_products import are_for_tensor_cores, product
from mambakit.ops.model_layer import Layer

FEWEST, MOST = tensor_core_products.FEWEST_ROWS, tensor_core_products.MOST_ROWS


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_products, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(step_products, "has_clusters", lambda _: True)
    monkeypatch.setattr(step_products, "has_warpgroups", lambda _: True)


def make(
    batch: int, dtype: torch.dtype = torch.bfloat16, rows: int = 96, columns: int = 72
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, columns, dtype=dtype), torch.zeros(batch, columns, dtype=dtype)


def is_on_tensor_cores(weight: torch.Tensor, x: torch.Tensor) -> bool:
    return "CLUSTER" in product(weight, x, 1).constants


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [FEWEST, 9, MOST])
def test_many_rows_in_half_precision(batch: int, dtype: torch.dtype) -> None:
    assert is_on_tensor_cores(*make(batch, dtype))


@pytest.mark.parametrize("batch", [1, FEWEST - 1, MOST + 1])
def test_fewer_and_more_rows(batch: int) -> None:
    assert not is_on_tensor_cores(*make(batch))


def test_float32_keeps_its_precision() -> None:
    assert not is_on_tensor_cores(*make(64, torch.float32))


@pytest.mark.parametrize("columns", [17, 68])
def test_rows_that_do_not_start_at_16_bytes(columns: int) -> None:
    assert not is_on_tensor_cores(*make(64, columns=columns))


def test_x_between_other_numbers() -> None:
    weight, _ = make(64)
    around = torch.zeros(64, 160, dtype=torch.bfloat16)
    assert is_on_tensor_cores(weight, around[:, 8:80])
    assert not is_on_tensor_cores(weight, around[:, 4:76])
    assert not is_on_tensor_cores(weight, torch.zeros(64, 156, dtype=torch.bfloat16)[:, :72])


def test_a_gpu_without_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_products, "has_clusters", lambda _: False)
    assert not is_on_tensor_cores(*make(64))


def test_x_of_float16_is_wide_before_it_is_scaled() -> None:
    weight, _ = make(64, torch.float16)
    found = product(weight, torch.zeros(64, 72), 1)
    assert (found.constants["IO"], found.constants["X"]) == ("float16", "float")
    assert "CLUSTER" in found.constants


@pytest.mark.parametrize(("has_warpgroups", "threads"), [(False, 256), (True, 256)])
def test_the_launch_on_tensor_cores(
    has_warpgroups: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_products, "has_warpgroups", lambda _: has_warpgroups)
    found = product(*make(64, rows=8192, columns=2048), 4)
    tiles = tensor_core_products.plan(8192, 2048, 2, 132, has_warpgroups=has_warpgroups)
    assert (found.grid, found.parts, found.block) == ((tiles.blocks, 1), 32, threads)
    assert found.shared == tiles.shared_memory(64, 2)


def test_the_launch_number_by_number() -> None:
    found = product(*make(20, torch.float32), 1)
    assert found.constants["BATCH"] == 8
    assert found.grid == (found.parts, 3)
    assert found.block == 32 * int(found.constants["WARPS"])
    assert found.shared == 0


def make_layer(rank: int, d_state: int = 16, dtype: torch.dtype = torch.bfloat16) -> Layer:
    return zero_layer(dtype, 24, 64, rank, d_state)


def test_a_layer_with_products_for_tensor_cores() -> None:
    assert are_for_tensor_cores(make_layer(8), 64)
    assert not are_for_tensor_cores(make_layer(8), FEWEST - 1)
    assert not are_for_tensor_cores(make_layer(8), MOST + 1)
    assert not are_for_tensor_cores(make_layer(8, dtype=torch.float32), 64)


@pytest.mark.parametrize(("rank", "d_state"), [(2, 16), (8, 15)])
def test_a_layer_whose_dt_does_not_start_at_16_bytes(rank: int, d_state: int) -> None:
    """Of dt_proj, or of what x_proj gives, rows of R + 2 N numbers."""
    assert not are_for_tensor_cores(make_layer(rank, d_state), 64)
