"""A decoding step of a whole model on a GPU: every kernel by itself, then the step beside the modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from accuracy import error
from examples import captured
from torch import Tensor, nn
from torch.nn.functional import linear

from mambakit import ops
from mambakit.errors import ArgumentError
from mambakit.models import MambaConfig, MambaLanguageModel, ModelState
from mambakit.models.fused_step import fused_step, settler, should_defer
from mambakit.ops.cuda import (
    launch,
    many_rows_step,
    model_step,
    one_kernel_step,
    step_products,
    tensor_core_products,
)
from mambakit.ops.deferred_states import REPEATS, DeferredStates
from mambakit.ops.model_layer import Layer

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
BATCHES = [1, 2, 3, 4, 5, 8, 9, 16, 33, 64, 100]
"""From 5 to 64, half precision goes to tensor cores where its rows start at 16 bytes."""
SIZES = {
    "16 bytes": {"d_model": 72, "rank": 8},
    "8 bytes": {"d_model": 68, "rank": 4},
    "single numbers": {"d_model": 17, "rank": 3, "d_state": 5, "d_conv": 2},
    "one of each": {"d_model": 40, "rank": 1, "d_state": 1, "d_conv": 1},
    "several accesses": {"d_model": 776, "rank": 48, "d_state": 24},
}


LAYOUTS = {f"{count} multiprocessors": {"multiprocessors": count} for count in (1, 5, 200)}
LAYOUTS |= {
    f"{name}, warps": {**layout, "has_warpgroups": False} for name, layout in LAYOUTS.items()
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a product is laid out for: few multiprocessors fill with many rows a warp, many only with rows that warps
    share; and warps that multiply together, where there are any, or each by itself."""
    for name, value in request.param.items():
        monkeypatch.setattr(step_products, name, lambda _, value=value: value)


def make_layer(
    dtype: torch.dtype, batch: int, *, d_model: int, rank: int, d_state: int = 16, d_conv: int = 4
) -> Layer:
    """A layer of random numbers, of which those that stay float32 are."""
    d_inner = 2 * d_model

    def half(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape)).to(DEVICE, dtype)

    def full(*shape: int) -> Tensor:
        return torch.randn(shape).to(DEVICE)

    return Layer(
        norm=half(d_model),
        in_proj=half(2 * d_inner, d_model, scale=d_model**-0.5),
        conv=half(d_inner, 1, d_conv),
        conv_bias=half(d_inner),
        x_proj=half(rank + 2 * d_state, d_inner, scale=d_inner**-0.5),
        dt_proj=half(d_inner, rank, scale=rank**-0.5),
        dt_bias=full(d_inner) - 2,
        A_log=full(d_inner, d_state),
        D=full(d_inner),
        out_proj=half(d_model, d_inner, scale=d_inner**-0.5),
        conv_state=half(batch, d_inner, d_conv - 1),
        ssm_state=full(batch, d_inner, d_state),
    )


def wide(layer: Layer) -> Layer:
    return Layer(*(tensor.double() for tensor in layer if tensor is not None))


def assert_accurate(
    found: Iterable[Tensor], reference: Iterable[Tensor], exact: Iterable[Tensor]
) -> None:
    """At most twice the error of the reference in the same dtype; see tests/parity/accuracy.py."""
    for i, (ours, theirs, truth) in enumerate(zip(found, reference, exact, strict=True)):
        assert ours.shape == truth.shape
        if truth.numel() == 0:
            continue
        allowed = 2 * error(theirs, truth) + torch.finfo(torch.float32).eps / 2
        assert error(ours, truth) <= allowed, (
            f"output {i}: {error(ours, truth):.2e} > {allowed:.2e}"
        )


def make_residual(layer: Layer, batch: int, dtype: torch.dtype) -> model_step.Residual:
    """A residual stream with what the norm of the layer needs of it, its squares in five parts."""
    stream = 3 * torch.randn(batch, layer.norm.numel(), device=DEVICE)
    scaled = stream * layer.norm.float()
    squares = torch.stack([part.square().sum(1) for part in stream.chunk(5, dim=1)], dim=1)
    narrow = dtype if dtype == torch.bfloat16 else torch.float32
    return model_step.Residual(stream, scaled.to(narrow), squares)


Draw = tuple[list[Tensor], list[Tensor], list[Tensor]]


def assert_accurate_over(draws: int, draw: Callable[[], Draw]) -> None:
    """Compare many draws of (found, expected, exact) as one: of a few numbers the error is chance."""
    found, expected, exact = zip(*(draw() for _ in range(draws)), strict=True)
    assert_accurate(*(map(torch.cat, zip(*part, strict=True)) for part in (found, expected, exact)))


def draws_for(sizes: dict) -> int:
    return 10 if sizes["d_model"] < 50 else 1


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [17, 256, 1000])
def test_embedding(width: int, dtype: torch.dtype, index: torch.dtype) -> None:
    embedding, norm = (torch.randn(*s, device=DEVICE).to(dtype) for s in ((30, width), (width,)))
    tokens = torch.tensor([29, 0, 7, 7], dtype=index, device=DEVICE)
    stream, scaled, squares = model_step.embed(tokens, embedding, norm)
    assert torch.equal(stream, embedding[tokens.long()].float())
    assert torch.equal(scaled, (stream * norm.float()).to(scaled.dtype))
    torch.testing.assert_close(squares.sum(1), stream.square().sum(1))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_in_proj(sizes: dict, dtype: torch.dtype, batch: int, layout: None) -> None:
    def reference(layer: Layer, stream: Tensor) -> list[Tensor]:
        normed = ops.rms_norm(stream, layer.norm, EPS, backend="reference")
        x, z = linear(normed.to(layer.in_proj.dtype), layer.in_proj).chunk(2, dim=-1)
        weight, state = layer.conv.squeeze(1), layer.conv_state.clone()
        x = ops.causal_conv1d_step(state, x, weight, layer.conv_bias, "silu", backend="reference")
        return [x, z, state]

    def draw() -> Draw:
        layer = make_layer(dtype, batch, **sizes)
        residual = make_residual(layer, batch, dtype)
        expected = reference(layer, residual.stream)
        exact = reference(wide(layer), residual.stream.double())
        x, z = model_step.in_proj(layer, residual, EPS)
        return [x, z, layer.conv_state], expected, exact

    assert_accurate_over(draws_for(sizes), draw)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_x_proj(sizes: dict, dtype: torch.dtype, batch: int, layout: None) -> None:
    layer = make_layer(dtype, batch, **sizes)
    x = torch.randn(batch, 2 * sizes["d_model"], device=DEVICE).to(dtype)
    exact = linear(x.double(), layer.x_proj.double())
    for kept in {torch.float32, dtype}:
        found = model_step.project(layer.x_proj, x, kept)
        assert found.dtype == kept
        assert_accurate([found], [linear(x, layer.x_proj)], [exact])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_dt_proj(sizes: dict, dtype: torch.dtype, batch: int, layout: None) -> None:
    """Of the first columns of what x_proj gave."""
    layer = make_layer(dtype, batch, **sizes)
    low = torch.randn(batch, layer.x_proj.shape[0], device=DEVICE).to(dtype)[:, : sizes["rank"]]
    found = model_step.project(layer.dt_proj, low, dtype)
    exact = linear(low.double(), layer.dt_proj.double())
    assert_accurate([found], [linear(low, layer.dt_proj)], [exact])


@pytest.mark.parametrize("steering", ["float32", "dtype of x"])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 9, 21])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_scan(sizes: dict, dtype: torch.dtype, batch: int, steering: str) -> None:
    layer = make_layer(dtype, batch, **sizes)
    rank, d_state = layer.dt_proj.shape[1], layer.A_log.shape[1]
    x, z = torch.randn(batch, 4 * sizes["d_model"], device=DEVICE).to(dtype).chunk(2, dim=1)
    steers = torch.randn(batch, rank + 2 * d_state, device=DEVICE).to(dtype)
    steers = steers.float() if steering == "float32" else steers

    def reference(layer: Layer, x: Tensor, z: Tensor, steers: Tensor) -> list[Tensor]:
        low, B, C = steers.to(x.dtype).split([rank, d_state, d_state], dim=1)
        dt, state = linear(low, layer.dt_proj), layer.ssm_state.clone()
        y = ops.selective_scan_step(
            state, x, dt, -layer.A_log.exp(), B, C, layer.D, z, layer.dt_bias, True, backend="reference"
        )  # fmt: skip
        return [y, state]

    expected = reference(layer, x, z, steers)
    exact = reference(wide(layer), x.double(), z.double(), steers.double())
    y = model_step.scan(layer, x, z, steers)
    assert_accurate([y, layer.ssm_state], expected, exact)


@pytest.mark.parametrize("batch", [1, 9, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_scan_after_the_projection_of_dt(sizes: dict, dtype: torch.dtype, batch: int) -> None:
    layer = make_layer(dtype, batch, **sizes)
    rank, d_state = layer.dt_proj.shape[1], layer.A_log.shape[1]
    x, z = torch.randn(batch, 4 * sizes["d_model"], device=DEVICE).to(dtype).chunk(2, dim=1)
    dt, steers = (
        torch.randn_like(x),
        torch.randn(batch, rank + 2 * d_state, device=DEVICE).to(dtype),
    )

    def reference(layer: Layer, *tensors: Tensor) -> list[Tensor]:
        x, z, steers, dt = tensors
        _, B, C = steers.split([rank, d_state, d_state], dim=1)
        state = layer.ssm_state.clone()
        y = ops.selective_scan_step(
            state, x, dt, -layer.A_log.exp(), B, C, layer.D, z, layer.dt_bias, True, backend="reference"
        )  # fmt: skip
        return [y, state]

    inputs = (x, z, steers, dt)
    expected = reference(layer, *inputs)
    exact = reference(wide(layer), *(tensor.double() for tensor in inputs))
    y = model_step.scan(layer, *inputs)
    assert_accurate([y, layer.ssm_state], expected, exact)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_out_proj(sizes: dict, dtype: torch.dtype, batch: int, layout: None) -> None:
    def reference(layer: Layer, y: Tensor, stream: Tensor, norm: Tensor) -> list[Tensor]:
        normed, total = ops.add_rms_norm(
            linear(y, layer.out_proj), stream, norm, EPS, backend="reference"
        )
        return [total, normed]

    def draw() -> Draw:
        layer = make_layer(dtype, batch, **sizes)
        residual = make_residual(layer, batch, dtype)
        y = torch.randn(batch, 2 * sizes["d_model"], device=DEVICE).to(dtype)
        norm = torch.randn_like(layer.norm)
        before = residual.stream.clone()
        expected = reference(layer, y, before, norm)
        exact = reference(wide(layer), y.double(), before.double(), norm.double())
        after = model_step.out_proj(layer, y, residual, norm)
        assert after.stream is residual.stream
        scale = (after.squares.sum(1) / norm.numel() + EPS).rsqrt()
        normed = (after.scaled.float() * scale[:, None]).to(dtype)
        return [after.stream, normed], expected, exact

    assert_accurate_over(draws_for(sizes), draw)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "d_model"), [(300, 72), (301, 17), (1001, 776)])
def test_head(vocab: int, d_model: int, dtype: torch.dtype, batch: int, layout: None) -> None:
    layer = make_layer(dtype, batch, d_model=d_model, rank=1)
    residual = make_residual(layer, batch, dtype)
    head = torch.randn(vocab, d_model, device=DEVICE).to(dtype)

    def reference(stream: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        normed = ops.rms_norm(stream, norm, EPS, backend="reference")
        return linear(normed.to(head.dtype), head)

    expected = reference(residual.stream, layer.norm, head)
    exact = reference(*(t.double() for t in (residual.stream, layer.norm, head)))
    assert_accurate([model_step.logits_of(head, residual, EPS)], [expected], [exact])


CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "untied": {"tie_embeddings": False},
    "odd sizes": {"d_model": 17, "d_state": 5, "d_conv": 2, "dt_rank": 3, "expand": 3},
    "no taps before, one state": {"d_conv": 1, "d_state": 1, "dt_rank": 1},
    "many states": {"d_state": 128},
    "tensor cores": {"d_model": 96, "dt_rank": 8},
    "wide": {"d_model": 768, "n_layer": 2},
    "one kernel": {"d_model": 256, "n_layer": 5},
    "one kernel, other sizes": {
        "d_model": 256,
        "d_state": 32,
        "d_conv": 2,
        "dt_rank": 40,
        "expand": 3,
    },
    "s4d constant": {"A_init": "constant", "norm_epsilon": 1e-2},
}


def make_model(
    dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any
) -> MambaLanguageModel:
    torch.manual_seed(seed)
    config = MambaConfig(**{"d_model": 64, "n_layer": 3, "vocab_size": 300, **fields})
    model = MambaLanguageModel(config)
    spread = 0.8 / max(8.0, config.d_model**0.5)  # wider ones would leave the range of float16
    for parameter in model.parameters():  # equal rows and values would hide mistakes
        parameter.data += spread * torch.randn_like(parameter)
    return model.to(DEVICE, dtype)


def read(model: MambaLanguageModel, batch: int) -> tuple[Tensor, ModelState]:
    """Tokens to go on with, (B, 5), and the state after a prompt."""
    tokens = torch.randint(0, 300, (batch, 9), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(DEVICE)
    return tokens[:, 4:], model.prefill(tokens[:, :4])[1]


@torch.no_grad()
def by_modules(model: MambaLanguageModel, tokens: Tensor, state: ModelState) -> Tensor:
    return model.lm_head(model.backbone.step(tokens, state))


@torch.no_grad()
def fused(model: MambaLanguageModel, tokens: Tensor, state: ModelState) -> Tensor:
    step = fused_step(model, tokens.device, state)
    assert step is not None
    return step(tokens)


def numbers(state: ModelState) -> list[Tensor]:
    return [tensor for layer in state.layers for tensor in (layer.conv_state, layer.ssm_state)]


def in_double(
    model: MambaLanguageModel, state: ModelState
) -> tuple[MambaLanguageModel, ModelState]:
    twin = MambaLanguageModel(model.config).to(DEVICE, torch.float64)
    twin.load_state_dict(model.state_dict())
    copy = state.clone()
    for layer in copy.layers:
        layer.conv_state, layer.ssm_state = layer.conv_state.double(), layer.ssm_state.double()
    return twin.double(), copy


def without_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (one_kernel_step, many_rows_step):
        monkeypatch.setattr(module, "has_room", lambda _: False)


@pytest.fixture
def many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one kernel, of narrow models too."""
    monkeypatch.setattr(many_rows_step, "LEAST_WIDTH", 256)


@pytest.fixture
def only_one_kernel(many_rows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("a step of many kernels")

    monkeypatch.setattr(model_step, "_with_own_products", refuse)
    monkeypatch.setattr(model_step, "_with_library_products", refuse)


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 9, 40, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_a_step_is_as_accurate_as_the_modules(
    fields: dict[str, Any], dtype: torch.dtype, batch: int
) -> None:
    seeds = iter(range(20))

    def draw() -> Draw:
        model = make_model(dtype, next(seeds), **fields)
        tokens, state = read(model, batch)
        beside = state.clone()
        exact_model, exact_state = in_double(model, state)
        for t in range(3):
            logits = fused(model, tokens[:, t], state)
            of_modules = by_modules(model, tokens[:, t], beside)
            truth = by_modules(exact_model, tokens[:, t], exact_state)
        assert logits.dtype == dtype
        return (
            [logits, *numbers(state)], [of_modules, *numbers(beside)], [truth, *numbers(exact_state)]
        )  # fmt: skip

    # With one state, B is one number a row.
    assert_accurate_over(20 if fields.get("d_state") == 1 else 3, draw)


@pytest.mark.parametrize("batch", [5, 9, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_so_is_a_step_without_tensor_cores(
    fields: dict[str, Any], dtype: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Hopper: number by number, and from 9 rows on with the library's products."""
    monkeypatch.setattr(step_products, "has_clusters", lambda _: False)
    without_one_kernel(monkeypatch)
    test_a_step_is_as_accurate_as_the_modules(fields, dtype, batch)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_so_is_a_step_of_many_kernels(
    dtype: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model for which there is one kernel."""
    without_one_kernel(monkeypatch)
    test_a_step_is_as_accurate_as_the_modules(CONFIGS["wide"], dtype, batch)


@pytest.mark.parametrize("blocks", [15, 50])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_so_is_a_step_of_one_kernel_with_fewer_blocks(
    dtype: torch.dtype,
    batch: int,
    blocks: int,
    only_one_kernel: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which have up to 35 channels each, and up to four rows of x_proj."""
    monkeypatch.setattr(one_kernel_step, "multiprocessors", lambda _: blocks)
    test_a_step_is_as_accurate_as_the_modules(CONFIGS["one kernel"], dtype, batch)


@pytest.mark.parametrize("batch", [9, 17, 33, 64, 65, 100, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_model", [256, 1024])
def test_so_is_a_step_of_many_rows_in_one_kernel(
    d_model: int, dtype: torch.dtype, batch: int, only_one_kernel: None
) -> None:
    fields = {"d_model": d_model, "n_layer": 2, "norm_epsilon": 1e-2}
    test_a_step_is_as_accurate_as_the_modules(fields, dtype, batch)


@pytest.mark.parametrize("batch", [64, 128])
@pytest.mark.parametrize("d_model", [1536, 2048, 2560])
def test_so_is_a_step_of_many_rows_of_wider_models(
    d_model: int, batch: int, only_one_kernel: None
) -> None:
    fields = {"d_model": d_model, "n_layer": 2, "tie_embeddings": False, "vocab_size": 5003}
    test_a_step_is_as_accurate_as_the_modules(fields, torch.bfloat16, batch)


@pytest.mark.parametrize("batch", [9, 70])
def test_so_is_a_step_of_many_rows_of_an_odd_vocabulary(batch: int, only_one_kernel: None) -> None:
    """Whose logits are not written in pairs."""
    fields = {"d_model": 768, "n_layer": 2, "vocab_size": 301, "pad_vocab_size_multiple": 1}
    test_a_step_is_as_accurate_as_the_modules(fields, torch.bfloat16, batch)


@pytest.mark.parametrize("clusters", [12, 29])
@pytest.mark.parametrize("batch", [20, 70])
@pytest.mark.parametrize("d_conv", [2, 4])
def test_so_is_a_step_of_many_rows_in_fewer_clusters(
    d_conv: int, batch: int, clusters: int, only_one_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many_rows_step, "clusters", lambda _: clusters)
    fields = {"d_model": 768, "n_layer": 2, "d_conv": d_conv}
    test_a_step_is_as_accurate_as_the_modules(fields, torch.bfloat16, batch)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["one kernel", "one kernel, other sizes", "wide"])
def test_so_is_a_step_of_one_kernel(
    name: str, dtype: torch.dtype, batch: int, only_one_kernel: None
) -> None:
    test_a_step_is_as_accurate_as_the_modules(CONFIGS[name], dtype, batch)


def assert_rows_are_independent(
    model: MambaLanguageModel, batch: int, *parts: Sequence[int], steps: int = 3
) -> None:
    """Logits and states of these rows of a batch: the same bits among themselves as among all."""
    tokens, state = read(model, batch)
    selected = [torch.tensor(rows, device=DEVICE) for rows in parts]
    alone = [state.select(rows) for rows in selected]
    for t in range(steps):
        logits = fused(model, tokens[:, t], state)
        for rows, others in zip(selected, alone, strict=True):
            assert torch.equal(fused(model, tokens[rows, t], others), logits[rows])
    for rows, others in zip(selected, alone, strict=True):
        assert all(map(torch.equal, numbers(others), numbers(state.select(rows))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d_model", [64, 520])
def test_a_row_does_not_depend_on_the_others(
    d_model: int, dtype: torch.dtype, layout: None
) -> None:
    model = make_model(dtype, d_model=d_model, n_layer=2)
    most = 8 if dtype == torch.float32 else tensor_core_products.FEWEST_ROWS - 1
    parts = [0], [1, 2], range(3, most), [3, 0, 2], range(1, 4)
    assert_rows_are_independent(model, most, *parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_row_on_tensor_cores_does_not_depend_on_the_others(
    dtype: torch.dtype, layout: None
) -> None:
    model = make_model(dtype, d_model=128, n_layer=2)
    parts = range(5), range(8, 16), range(3, 12), range(40, 60), range(33)
    assert_rows_are_independent(model, 64, *parts, range(63, -1, -1), steps=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_model", [256, 1024])
def test_a_row_in_one_kernel_does_not_depend_on_the_others(
    d_model: int, dtype: torch.dtype, only_one_kernel: None
) -> None:
    model = make_model(dtype, d_model=d_model, n_layer=3)
    parts = range(1), range(1, 3), range(3, 6), range(2, 7), range(1, 8)
    assert_rows_are_independent(model, 8, *parts, range(7, -1, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_model", [256, 768])
def test_a_row_of_many_in_one_kernel_does_not_depend_on_the_others(
    d_model: int, dtype: torch.dtype, only_one_kernel: None
) -> None:
    model = make_model(dtype, d_model=d_model, n_layer=3)
    parts = range(9), range(3, 20), range(40, 73), range(64), range(63, 128), range(28, 128)
    assert_rows_are_independent(model, 128, *parts, range(127, -1, -1))


@pytest.mark.parametrize("batch", [9, 30, 64, 77, 128])
@pytest.mark.parametrize(
    ("d_model", "dtype"), [(256, torch.float16), (768, torch.bfloat16), (1536, torch.bfloat16)]
)
def test_states_that_are_written_every_second_step(
    d_model: int, dtype: torch.dtype, batch: int, only_one_kernel: None
) -> None:
    """Change no bit."""
    model = make_model(dtype, d_model=d_model, n_layer=3)
    tokens, state = read(model, batch)
    twin, (conv, ssm) = state.clone(), numbers(state)[:2]
    pool = DeferredStates.empty((3, batch + 3, *ssm.shape[1:]), like=conv)
    deferred = pool.view(batch)
    step = model.prepared_step(twin, deferred)
    for t in range(5):
        assert torch.equal(step(tokens[:, t]), fused(model, tokens[:, t], state))
        is_behind = deferred.turns == REPEATS
        assert 0 < is_behind.sum() < batch
        for ours, truth in zip(twin.layers, state.layers, strict=True):
            assert torch.equal(ours.conv_state, truth.conv_state)
            assert torch.equal(ours.ssm_state[~is_behind], truth.ssm_state[~is_behind])
            assert (ours.ssm_state != truth.ssm_state).flatten(1).any(1).equal(is_behind)
    settler(model, twin, deferred)()
    assert all(map(torch.equal, numbers(twin), numbers(state)))
    assert not (deferred.turns == REPEATS).any()
    assert (pool.inputs[:, :, batch:] == 0).all()
    assert (pool.B[:, batch:] == 0).all()


@pytest.mark.parametrize(
    ("d_model", "batch", "defers"),
    [(1536, 33, True), (1536, 128, True), (1536, 32, False), (1024, 64, False), (1536, 129, False)],
)
def test_where_states_are_deferred(d_model: int, batch: int, defers: bool) -> None:
    model = make_model(torch.bfloat16, d_model=d_model, n_layer=1)
    assert should_defer(model, model.initial_state(batch)) is defers


def test_what_cannot_defer_says_so() -> None:
    model = make_model(torch.bfloat16, d_model=256)
    state = read(model, 4)[1]
    conv, ssm = numbers(state)[:2]
    with pytest.raises(ArgumentError, match="deferred: got some"):
        model.prepared_step(state, DeferredStates.empty((3, *ssm.shape), like=conv))


@pytest.mark.parametrize(("d_model", "batch"), [(512, 4), (768, 20)])
def test_steps_of_one_kernel_on_two_streams(
    d_model: int, batch: int, only_one_kernel: None
) -> None:
    """Blocks that wait for one another, of two kernels at once: neither may keep the other's from the device."""
    model = make_model(torch.bfloat16, d_model=d_model, n_layer=6)
    tokens, start = read(model, batch)
    expected, state = [], start.clone()
    for t in range(5):
        expected.append(fused(model, tokens[:, t], state))

    streams, graphs = [torch.cuda.Stream() for _ in range(2)], []
    for _ in streams:
        state, static = start.clone(), tokens[:, 0].clone()
        graph, (logits,) = captured(lambda static=static, state=state: [model.step(static, state)])
        graphs.append((graph, logits, static, state))
    found: list[list[Tensor]] = [[], []]
    for turn in range(40):
        for stream, (graph, logits, static, state), results in zip(
            streams, graphs, found, strict=True
        ):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                if turn % 5 == 0:
                    for tensor, begin in zip(numbers(state), numbers(start), strict=True):
                        tensor.copy_(begin)
                static.copy_(tokens[:, turn % 5])
                graph.replay()
                results.append(logits.clone())
    torch.cuda.synchronize()
    for results in found:
        assert all(torch.equal(r, expected[turn % 5]) for turn, r in enumerate(results))


@pytest.mark.parametrize("d_model", [128, 256])
@pytest.mark.parametrize("batch", [2, 11, 70])
def test_states_in_a_pool(batch: int, d_model: int) -> None:
    """The first rows of larger tensors move on, the others stay; the taps may lie in any order."""
    model = make_model(torch.bfloat16, d_model=d_model)
    tokens, state = read(model, batch)
    pool = state.clone()
    for layer, own in zip(pool.layers, state.layers, strict=True):
        conv = own.conv_state.transpose(1, 2)
        layer.conv_state = torch.cat([conv, torch.ones_like(conv)]).transpose(1, 2)
        layer.ssm_state = torch.cat([own.ssm_state, torch.ones_like(own.ssm_state)])
    view = pool.clone()
    for layer, all_of in zip(view.layers, pool.layers, strict=True):
        layer.conv_state, layer.ssm_state = all_of.conv_state[:batch], all_of.ssm_state[:batch]
    assert torch.equal(fused(model, tokens[:, 0], view), fused(model, tokens[:, 0], state))
    for found, own in zip(numbers(pool), numbers(state), strict=True):
        assert torch.equal(found[:batch], own)
        assert (found[batch:] == 1).all()


@pytest.mark.parametrize("batch", [9, 77])
def test_states_of_many_rows_in_a_pool(batch: int, only_one_kernel: None) -> None:
    """Whose rows have room between them."""
    model = make_model(torch.bfloat16, d_model=768)
    tokens, state = read(model, batch)
    wide = [
        torch.ones(batch + 3, 2, *own.shape[1:], dtype=own.dtype, device=DEVICE)
        for own in numbers(state)
    ]
    view = state.clone()
    for i, (layer, own) in enumerate(zip(view.layers, state.layers, strict=True)):
        layer.conv_state, layer.ssm_state = (pool[:batch, 0] for pool in wide[2 * i : 2 * i + 2])
        layer.conv_state.copy_(own.conv_state)
        layer.ssm_state.copy_(own.ssm_state)
    assert torch.equal(fused(model, tokens[:, 0], view), fused(model, tokens[:, 0], state))
    for pool, own in zip(wide, numbers(state), strict=True):
        assert torch.equal(pool[:batch, 0], own)
        assert (pool[batch:] == 1).all()
        assert (pool[:, 1] == 1).all()


@pytest.mark.parametrize("d_model", [128, 256, 768])
@pytest.mark.parametrize("batch", [1, 8, 9, 64, 129])
def test_a_graph_of_a_step(batch: int, d_model: int, many_rows: None) -> None:
    model = make_model(torch.bfloat16, d_model=d_model)
    tokens, start = read(model, batch)
    state, expected = start.clone(), []
    for t in range(5):
        expected.append(model.step(tokens[:, t], state))
    last = numbers(state)

    state, static = start.clone(), tokens[:, 0].clone()
    graph, (logits,) = captured(lambda: [model.step(static, state)])
    for tensor, begin in zip(numbers(state), numbers(start), strict=True):
        tensor.copy_(begin)
    for t, truth in enumerate(expected):
        static.copy_(tokens[:, t])
        graph.replay()
        assert torch.equal(logits, truth)
    assert all(map(torch.equal, numbers(state), last))


@pytest.mark.parametrize("batch", [3, 8, 20, 64])
@pytest.mark.parametrize("d_model", [128, 1024])
def test_overlapping_kernels_change_no_bit(
    d_model: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_one_kernel(monkeypatch)
    model = make_model(torch.bfloat16, d_model=d_model, n_layer=8)
    tokens, start = read(model, batch)

    def steps() -> list[Tensor]:
        state, found = start.clone(), []
        for t in range(200):
            found.append(fused(model, tokens[:, t % 5], state))
        return [*found, *numbers(state)]

    overlapping = steps()
    monkeypatch.setattr(launch, "_can_overlap", lambda _: False)
    assert all(map(torch.equal, steps(), overlapping))


@pytest.mark.parametrize("batch", [4, 37, 128])
def test_many_steps_of_one_kernel_give_the_same_bits(batch: int, only_one_kernel: None) -> None:
    """Blocks hand numbers to one another without barriers of all; 300 times, in whatever order they come."""
    model = make_model(torch.bfloat16, d_model=768, n_layer=8)
    tokens, start = read(model, batch)
    expected: list[Tensor] = []
    for turn in range(60):
        state = start.clone()
        found = [fused(model, tokens[:, t], state) for t in range(5)]
        expected = expected or [*found, *numbers(state)]
        assert all(map(torch.equal, [*found, *numbers(state)], expected)), turn


def test_new_weights_are_seen() -> None:
    model = make_model()
    tokens, state = read(model, 2)
    fused(model, tokens[:, 0], state.clone())
    model.load_state_dict(make_model(A_init="random").state_dict(), assign=True)
    in_proj = model.backbone.layers[1].mixer.in_proj
    in_proj.weight.data = torch.randn_like(in_proj.weight)
    expected = by_modules(model, tokens[:, 0], state.clone())
    torch.testing.assert_close(fused(model, tokens[:, 0], state), expected, rtol=1e-4, atol=1e-4)


def test_states_count_as_changed() -> None:
    model = make_model()
    tokens, state = read(model, 1)
    versions = [tensor._version for tensor in numbers(state)]
    fused(model, tokens[:, 0], state)
    assert all(t._version > v for t, v in zip(numbers(state), versions, strict=True))


def test_no_sequences() -> None:
    model = make_model()
    tokens, state = read(model, 1)
    none = state.select(torch.arange(0, device=DEVICE))
    assert fused(model, tokens[:0, 0], none).shape == (0, model.config.padded_vocab_size)


class Adapted(nn.Module):
    """What LoRA puts in the place of a projection."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 1


def adapt(model: MambaLanguageModel) -> None:
    mixer = model.backbone.layers[1].mixer
    mixer.in_proj = Adapted(mixer.in_proj)


def use_strided_weight(model: MambaLanguageModel) -> None:
    weight = model.backbone.layers[0].mixer.out_proj.weight
    weight.data = weight.data.t().contiguous().t()


CHANGES: dict[str, Callable[[MambaLanguageModel], object]] = {
    "adapter": adapt,
    "hook": lambda model: model.backbone.layers[2].mixer.x_proj.register_forward_hook(
        lambda _, __, out: out + 1
    ),
    "float64": lambda model: model.double(),
    "a norm in float32": lambda model: model.bfloat16().backbone.layers[1].norm.float(),
    "strided weight": use_strided_weight,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_not_plain_is_left_to_the_modules(
    change: Callable[[MambaLanguageModel], object],
) -> None:
    model = make_model()
    change(model)
    tokens, state = read(model, 2)
    assert fused_step(model, tokens.device, state) is None
    expected = by_modules(model, tokens[:, 0], state.clone())
    assert torch.equal(model.step(tokens[:, 0], state), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": True},
        {"conv_bias": False},
        {"A_init": "s4d-lin"},
        {"selective": ("dt", "B")},
        {"d_state": 33},
        {"d_state": 132},
        {"residual_in_fp32": False},
        {"mixer_norm_epsilon": 1e-5},
    ],
    ids=str,
)
def test_other_configs_are_left_to_the_modules(fields: dict[str, Any]) -> None:
    model = make_model(torch.bfloat16, **fields)
    tokens, state = read(model, 2)
    assert fused_step(model, tokens.device, state) is None
    assert model.step(tokens[:, 0], state).isfinite().all()


def test_autocast_is_left_to_the_modules() -> None:
    model = make_model()
    with torch.autocast("cuda", torch.bfloat16):
        tokens, state = read(model, 2)
        assert fused_step(model, tokens.device, state) is None
