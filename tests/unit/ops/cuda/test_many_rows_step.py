"""Which models the kernel of a whole step of 9 to 128 rows takes, and how: questions that need no GPU."""

from __future__ import annotations

import pytest
import torch
from zero_layers import zero_layer

from mambakit.ops.cuda import many_rows_step
from mambakit.ops.cuda.many_rows_step import Layout, plan, suitable, tile_of
from mambakit.ops.cuda.one_kernel_step import SHARED, Shape
from mambakit.ops.model_layer import Layer

RELEASED = {"130m": 768, "370m": 1024, "790m": 1536, "1.4b": 2048, "2.8b": 2560}


def released(width: int) -> Shape:
    return Shape(width, 2 * width, width // 16, 16, 4)


@pytest.mark.parametrize("batch", [9, 16, 17, 33, 64, 65, 128])
@pytest.mark.parametrize("width", RELEASED.values(), ids=RELEASED)
@pytest.mark.parametrize("clusters", [30, 31, 32])
def test_released_models_fit(clusters: int, width: int, batch: int) -> None:
    layout = plan(released(width), batch, clusters)
    assert layout is not None
    own = 16 * -(-2 * width // 16 // clusters)
    held = layout.slots * 128 * own + layout.x_slots * 128 * tile_of(batch)
    assert held < SHARED
    assert layout.slots >= 2


def test_a_layout() -> None:
    assert plan(released(2048), 64, 30) == Layout(slots=8, x_slots=3)
    assert plan(released(2048), 65, 30) == Layout(slots=6, x_slots=3)
    assert plan(released(2560), 128, 30) == Layout(slots=4, x_slots=3)
    assert plan(released(768), 9, 30) == Layout(slots=many_rows_step.MOST_SLOTS - 7, x_slots=4)


@pytest.mark.parametrize(("batch", "tile"), [(9, 16), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_rows_for_which_there_is_room(batch: int, tile: int) -> None:
    assert tile_of(batch) == tile


@pytest.mark.parametrize(
    ("shape", "clusters"),
    [
        (Shape(640, 1280, 48, 16, 4), 30),
        (Shape(768, 2304, 48, 16, 4), 30),
        (Shape(768, 1536, 40, 16, 4), 30),
        (Shape(768, 1536, 48, 32, 4), 30),
        (Shape(768, 1536, 48, 16, 1), 30),
        (Shape(768, 1536, 48, 16, 5), 30),
        (Shape(256, 512, 16, 16, 4), 33),
        (Shape(3072, 6144, 192, 16, 4), 30),
        (Shape(256, 512, 256, 16, 4), 30),
    ],
    ids=[
        "width", "channels", "rank", "states", "one tap", "taps", "clusters without channels", "channels of a cluster",
        "wide rank",
    ],
)  # fmt: skip
def test_shapes_that_are_left_to_other_kernels(shape: Shape, clusters: int) -> None:
    assert plan(shape, 64, clusters) is None


def make_layer(dtype: torch.dtype = torch.bfloat16, width: int = 1024, batch: int = 9) -> Layer:
    return zero_layer(dtype, width, batch)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_rows_step, "clusters", lambda _: 30)
    monkeypatch.setattr(many_rows_step, "has_room", lambda _: True)


def is_suitable(*layers: Layer, batch: int = 9, head: torch.Tensor | None = None) -> bool:
    norm = layers[0].norm
    embedding = norm.new_zeros(10, norm.shape[0])
    return suitable(layers, (embedding, norm, embedding if head is None else head), batch)


def test_plain_layers() -> None:
    assert is_suitable(make_layer(), make_layer())
    assert is_suitable(make_layer(torch.float16, batch=128), batch=128)


@pytest.mark.parametrize("batch", [8, 129])
def test_fewer_and_more_rows_are_left_to_other_kernels(batch: int) -> None:
    assert not is_suitable(make_layer(batch=batch), batch=batch)


def test_so_is_float32() -> None:
    assert not is_suitable(make_layer(torch.float32))


def test_so_are_narrow_models(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_suitable(make_layer(width=512))
    monkeypatch.setattr(many_rows_step, "LEAST_WIDTH", 512)
    assert is_suitable(make_layer(width=512))


@pytest.mark.parametrize(("name", "value"), [("has_room", False), ("clusters", 0)])
def test_so_is_a_gpu_without_room(name: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_rows_step, name, lambda _: value)
    assert not is_suitable(make_layer())


def test_so_are_very_many_layers() -> None:
    layer = make_layer()
    assert is_suitable(*[layer] * many_rows_step.MOST_LAYERS)
    assert not is_suitable(*[layer] * (many_rows_step.MOST_LAYERS + 1))


def test_so_are_layers_of_different_shapes() -> None:
    other = torch.zeros(1536, 32, dtype=torch.bfloat16)
    assert not is_suitable(make_layer(), make_layer()._replace(dt_proj=other))


def test_so_are_states_whose_channels_do_not_follow_one_another() -> None:
    conv = torch.zeros(9, 3, 1536, dtype=torch.bfloat16).transpose(1, 2)
    assert not is_suitable(make_layer()._replace(conv_state=conv))
    ssm = torch.zeros(9, 1536, 2, 16)[:, :, 0]
    assert not is_suitable(make_layer()._replace(ssm_state=ssm))


def test_rows_of_states_may_have_room_between_them() -> None:
    pool = torch.zeros(9 * 2 * 1536 * 3, dtype=torch.bfloat16)
    state = pool.as_strided((9, 1536, 3), (1536 * 3 + 8, 3, 1))
    assert is_suitable(make_layer()._replace(conv_state=state))
    state = pool.as_strided((9, 1536, 3), (1536 * 3 + 4, 3, 1))
    assert not is_suitable(make_layer()._replace(conv_state=state))
    assert not is_suitable(make_layer(), make_layer()._replace(conv_state=state))


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that does not start at sixteen bytes."""
    flat = tensor.new_zeros(tensor.numel() + 2)[2:]
    return flat.view_as(tensor).copy_(tensor)


@pytest.mark.parametrize("name", Layer._fields[:12])
def test_so_is_what_does_not_start_at_sixteen_bytes(name: str) -> None:
    layer = make_layer()
    assert not is_suitable(layer._replace(**{name: shifted(getattr(layer, name))}))


def test_so_is_a_head_that_does_not() -> None:
    assert not is_suitable(make_layer(), head=shifted(torch.zeros(10, 768, dtype=torch.bfloat16)))


def test_parameters_fit() -> None:
    maps, addresses = 3 * many_rows_step.MOST_LAYERS + 4, 9 * many_rows_step.MOST_LAYERS + 14
    doubles = many_rows_step.MOST_LAYERS + 1
    assert 128 * maps + 8 * (addresses + 5 + doubles) <= 32764 - 63


@pytest.mark.parametrize(("own", "rows"), [(64, 56), (80, 56), (112, 56), (144, 56), (176, 56)])
def test_boxes_of_x_proj_fill_a_slot(own: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        many_rows_step, "tensor_map", lambda *box, swizzled: asked.append((box, swizzled))
    )
    x_proj = torch.zeros(160, 4096, dtype=torch.bfloat16)
    many_rows_step._steering_map(x_proj, own)
    assert asked == [((x_proj, rows, own + 8), False)]
    assert rows * (2 * own + 16) <= 128 * own < (rows + 8) * (2 * own + 16)
