"""How a convolution is cut into warps; the kernels themselves are tested on a GPU."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops.cuda import causal_conv1d as cuda

SHAPES = [
    (32, 2048, 1536),
    (4, 2048, 4096),
    (1, 65536, 1536),
    (1, 1, 1),
    (2, 33, 70),
    (4096, 16, 64),
]


@pytest.fixture(autouse=True)
def _on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)


def numbers(shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        ((32, 2048, 1536), 64, 128),  # four turns of all resident warps
        ((1, 65536, 1536), 64, 128),
        ((4, 2048, 4096), 24, 256),  # too few for that: 8 warps a multiprocessor
        ((8, 2048, 1536), 16, 192),
        ((512, 2048, 1536), 256, 256),  # no longer than sums are exact
        ((1, 5, 64), 16, 16),
    ],
)
def test_steps_of_a_thread(shape: tuple[int, int, int], forward: int, backward: int) -> None:
    assert cuda._run(numbers(shape), 4, cuda.WARPS_OF_ALL) == forward
    assert cuda._backward_run(numbers(shape), 4) == backward


@pytest.mark.parametrize("along", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_cover_all_runs(shape: tuple[int, int, int], along: int) -> None:
    x = numbers(shape)
    for run in (cuda._run(x, along, cuda.WARPS_OF_ALL), cuda._backward_run(x, along)):
        assert run % cuda.STEPS == 0
        assert cuda.SHORTEST <= run <= cuda.LONGEST
        warps = shape[0] * -(-shape[1] // run) * -(-shape[2] // (32 * along))
        assert 0 <= cuda._blocks(x, along, run) * cuda.WARPS - warps < cuda.WARPS


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_on_their_way_fit_into_shared_memory(dtype: torch.dtype, width: int) -> None:
    x, weight = torch.empty(0, dtype=dtype), torch.empty(0, width)
    row = cuda._most(x, weight) * x.element_size()
    assert row <= 16
    assert 2 * cuda.STEPS * 32 * cuda.WARPS * row <= 48 * 1024
