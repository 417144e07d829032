"""Which models the kernel of a whole step takes, and how its shared memory is divided: questions that need no GPU."""

from __future__ import annotations

import pytest
import torch
from zero_layers import zero_layer

from mambakit.ops.cuda import one_kernel_step
from mambakit.ops.cuda.one_kernel_step import SHARED, Layout, Shape, plan, suitable
from mambakit.ops.model_layer import Layer

RELEASED = {"130m": 768, "370m": 1024, "790m": 1536, "1.4b": 2048, "2.8b": 2560}


def released(width: int) -> Shape:
    return Shape(width, 2 * width, width // 16, 16, 4)


@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("width", RELEASED.values(), ids=RELEASED)
def test_released_models_fit(width: int, batch: int) -> None:
    layout = plan(released(width), batch, 132)
    assert layout is not None
    assert width % layout.part == 2 * width % layout.part == layout.part % 256 == 0
    held = layout.slots * 8 * (2 * layout.part + 64)
    assert 0.7 * SHARED < held < SHARED


def test_a_layout() -> None:
    assert plan(released(2048), 1, 132) == Layout(part=1024, slots=13)
    assert plan(released(2048), 8, 132) == Layout(part=1024, slots=10)
    assert plan(released(2560), 1, 132) == Layout(part=1280, slots=10)


def test_the_parts_of_k_do_not_depend_on_the_batch() -> None:
    for width in RELEASED.values():
        layouts = [plan(released(width), batch, 132) for batch in range(1, 9)]
        assert len({layout.part for layout in layouts if layout is not None}) == 1


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        (Shape(520, 1040, 40, 16, 4), 132),
        (Shape(256, 512 + 128, 16, 16, 4), 132),
        (Shape(768, 1536, 47, 16, 4), 132),
        (Shape(768, 1536, 48, 18, 4), 132),
        (Shape(768, 1536, 48, 12, 4), 132),
        (Shape(768, 1536, 48, 64, 4), 78),
        (Shape(2560, 5120, 160, 16, 4), 78),
        (Shape(256, 512, 16, 16, 4), 513),
        (Shape(256, 512, 256, 16, 4), 20),
    ],
    ids=[
        "width", "channels", "rank", "states in fours", "lanes of a channel", "lanes of a block", "channels of a block",
        "blocks without channels", "rows of x_proj",
    ],
)  # fmt: skip
def test_shapes_that_are_left_to_other_kernels(shape: Shape, blocks: int) -> None:
    assert plan(shape, 1, blocks) is None


def make_layer(dtype: torch.dtype = torch.bfloat16, width: int = 256, batch: int = 2) -> Layer:
    return zero_layer(dtype, width, batch)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_kernel_step, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(one_kernel_step, "has_room", lambda _: True)


def is_suitable(*layers: Layer, batch: int = 2, head: torch.Tensor | None = None) -> bool:
    norm = layers[0].norm
    embedding = norm.new_zeros(10, norm.shape[0])
    return suitable(layers, (embedding, norm, embedding if head is None else head), batch)


def test_plain_layers() -> None:
    assert is_suitable(make_layer(), make_layer())
    assert is_suitable(make_layer(torch.float16), batch=8)


def test_float32_is_left_to_other_kernels() -> None:
    assert not is_suitable(make_layer(torch.float32))


def test_more_rows_are_left_to_other_kernels() -> None:
    assert not is_suitable(make_layer(), batch=9)


def test_so_is_a_gpu_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_kernel_step, "has_room", lambda _: False)
    assert not is_suitable(make_layer())


def test_so_are_very_many_layers() -> None:
    layer = make_layer()
    assert is_suitable(*[layer] * one_kernel_step.MOST_LAYERS)
    assert not is_suitable(*[layer] * (one_kernel_step.MOST_LAYERS + 1))


def test_so_are_layers_of_different_shapes() -> None:
    assert not is_suitable(make_layer(), make_layer()._replace(dt_proj=torch.zeros(512, 8)))


def test_so_are_states_of_different_strides() -> None:
    other = torch.zeros(2, 3, 512, dtype=torch.bfloat16).transpose(1, 2)
    assert is_suitable(make_layer()._replace(conv_state=other))
    assert not is_suitable(make_layer(), make_layer()._replace(conv_state=other))


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that does not start at sixteen bytes."""
    flat = tensor.new_zeros(tensor.numel() + 2)[2:]
    return flat.view_as(tensor).copy_(tensor)


@pytest.mark.parametrize(
    "name", ["norm", "in_proj", "x_proj", "dt_proj", "A_log", "out_proj", "ssm_state"]
)
def test_so_is_what_does_not_start_at_sixteen_bytes(name: str) -> None:
    layer = make_layer()
    assert not is_suitable(layer._replace(**{name: shifted(getattr(layer, name))}))
    assert is_suitable(layer._replace(conv=shifted(layer.conv), D=shifted(layer.D)))


def test_so_is_a_head_that_does_not() -> None:
    assert not is_suitable(make_layer(), head=shifted(torch.zeros(10, 256, dtype=torch.bfloat16)))
