"""The ops among what PyTorch offers: graphs, compilation, streams, devices, autocast, checkpointing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from examples import OPS, STEPS, Inputs, call, captured, on
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mambakit.models import MambaConfig, MambaLanguageModel

pytestmark = pytest.mark.gpu
ALL = {**OPS, **STEPS}
CONFIG = MambaConfig(d_model=64, n_layer=3, vocab_size=200)


def example(name: str) -> tuple[Callable[..., Tensor | tuple[Tensor, ...]], Inputs]:
    """An op and new inputs on the GPU."""
    op, draw = ALL[name]
    return op, on("cuda", draw(), has_gradient=name in OPS)


def assert_same(found: list[Tensor], expected: list[Tensor], name: str) -> None:
    """To the bit; but cuBLAS may multiply by another algorithm."""
    tolerance = 1e-5 if name == "linear_cross_entropy" else 0.0
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


def make_model(device: str = "cuda", **fields) -> MambaLanguageModel:
    torch.manual_seed(0)
    return MambaLanguageModel(MambaConfig(**{**CONFIG.to_dict(), **fields})).to(device)


def make_tokens(batch: int = 3, seqlen: int = 67) -> Tensor:
    return torch.randint(0, 200, (batch, seqlen), generator=torch.Generator().manual_seed(1)).cuda()


def training_step(model: MambaLanguageModel, tokens: Tensor) -> list[Tensor]:
    """The loss and all gradients."""
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # The compiler's own.
@pytest.mark.parametrize("name", ALL)
def test_an_op_compiles_without_a_break(name: str) -> None:
    op, inputs = example(name)
    expected = call(op, inputs)
    # Inductor makes no code for complex numbers.
    backend = "aot_eager" if name.endswith("complex") else "inductor"
    found = call(torch.compile(op, fullgraph=True, backend=backend), inputs)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("A_init", ["s4d-real", "s4d-lin"])
def test_a_model_compiles_without_a_break(A_init: str) -> None:
    model, tokens = make_model(A_init=A_init), make_tokens()
    # Inductor makes no code for complex numbers.
    backend = "aot_eager" if model.config.is_complex else "inductor"

    def loss(tokens: Tensor) -> Tensor:
        return model.loss(tokens[:, :-1], tokens[:, 1:])[0]

    expected, parameters = training_step(model, tokens), list(model.parameters())
    found = torch.compile(loss, fullgraph=True, backend=backend)(tokens)
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)
    for ours, truth in zip(torch.autograd.grad(found, parameters), expected[1:], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_graph_of_forward_and_backward_replays_with_other_numbers(name: str) -> None:
    op, static = example(name)
    graph, found = captured(lambda: call(op, static))
    for _ in range(2):
        _, inputs = example(name)
        with torch.no_grad():
            for key, tensor in inputs.items():
                static[key].copy_(tensor)
        graph.replay()
        assert_same(found, call(op, inputs), name)


@pytest.mark.parametrize("A_init", ["s4d-real", "s4d-lin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_of_a_decoding_step(dtype: torch.dtype, A_init: str) -> None:
    model, tokens = make_model(A_init=A_init).to(dtype), make_tokens()
    _, start = model.prefill(tokens[:, :30])
    expected, state = [], start.clone()
    for t in range(30, 60):
        expected.append(model.step(tokens[:, t], state))

    state, static = start.clone(), tokens[:, 30].clone()
    graph, (logits,) = captured(lambda: [model.step(static, state)])
    for layer, begin in zip(state.layers, start.layers, strict=True):
        layer.conv_state.copy_(begin.conv_state)
        layer.ssm_state.copy_(begin.ssm_state)
    for t, truth in zip(range(30, 60), expected, strict=True):
        static.copy_(tokens[:, t])
        graph.replay()
        torch.testing.assert_close(logits, truth)


@pytest.mark.parametrize("name", ALL)
def test_runs_on_the_current_stream(name: str) -> None:
    """The inputs arrive late, on the same stream; another stream would read the zeros."""
    op, inputs = example(name)
    expected = call(op, inputs)
    late = {key: torch.zeros_like(tensor) for key, tensor in inputs.items()}
    for key, tensor in inputs.items():
        late[key].requires_grad_(tensor.requires_grad)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for key, tensor in inputs.items():
                late[key].copy_(tensor)
        found = call(op, late)
    stream.synchronize()
    assert_same(found, expected, name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ALL)
def test_two_devices_in_one_process(name: str) -> None:
    """The kernel runs where its tensors are, whatever device is the current one."""
    op, draw = ALL[name]
    inputs = draw()
    results = []
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        found = call(op, on(device, inputs, has_gradient=name in OPS))
        assert {str(tensor.device) for tensor in found} == {device}
        results.append([tensor.cpu() for tensor in found])
    assert torch.cuda.current_device() == 0
    for again in results[1:]:
        assert_same(again, results[0], name)


@pytest.mark.parametrize("name", OPS)
def test_checkpointing_changes_no_bit(name: str) -> None:
    op, inputs = example(name)
    expected = call(op, inputs)
    assert_same(call(lambda **x: checkpoint(op, **x, use_reentrant=False), inputs), expected, name)


def test_a_model_with_activation_checkpointing() -> None:
    model, tokens = make_model(), make_tokens()
    expected = training_step(model, tokens)
    model.activation_checkpointing = True
    for ours, truth in zip(training_step(model, tokens), expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-7)


def distance(found: list[Tensor], truth: list[Tensor]) -> float:
    """Relative error of all numbers together."""
    found, truth = ([t.detach().double().cpu() for t in tensors] for tensors in (found, truth))
    squares = sum((a - b).square().sum() for a, b in zip(found, truth, strict=True))
    return float((squares / sum(b.square().sum() for b in truth)) ** 0.5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"A_init": "s4d-lin"},
        {"selective": ("dt",)},
        {"selective": ()},
        {"conv_bias": False},
        {"mixer_norm_epsilon": 0.01, "dt_rank": 3},
    ],
    ids=str,
)
def test_a_training_step_is_as_accurate_as_on_the_cpu(fields: dict, precision: str) -> None:
    tokens = make_tokens(4, 130)
    exact = training_step(make_model("cpu", **fields).double(), tokens.cpu())
    errors = {}
    for device in ("cpu", "cuda"):
        with torch.autocast(device, torch.bfloat16, enabled=precision != "float32"):
            found = training_step(make_model(device, **fields), tokens.to(device))
        assert {gradient.dtype for gradient in found} == {torch.float32}
        errors[device] = distance(found[1:], exact[1:])
        torch.testing.assert_close(found[0].double().cpu(), exact[0], rtol=0.01, atol=0.0)
    assert errors["cuda"] <= 2 * errors["cpu"]


class Recorder(TorchDispatchMode):
    """Notes every call of one of our operators, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[torch._ops.OpOverload, tuple]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mambakit":
            assert not kwargs
            has_gradient = "backward" not in func.name()
            self.calls[func.name()] = (func, tuple(copied(x, has_gradient) for x in args))
        return func(*args, **(kwargs or {}))


def copied(argument: object, has_gradient: bool) -> object:
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().clone().requires_grad_(has_gradient and argument.requires_grad)


def recorded(name: str) -> Iterator[tuple[torch._ops.OpOverload, tuple]]:
    op, inputs = example(name)
    with Recorder() as recorder:
        call(op, inputs)
    assert any("cuda" in key for key in recorder.calls)
    yield from recorder.calls.values()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ALL)
def test_operators_obey_torch_library(name: str) -> None:
    for operator, arguments in recorded(name):
        opcheck(operator, arguments)


def test_half_precision_inputs_of_every_kind_give_finite_gradients() -> None:
    """Every op in every dtype, in the mix that autocast makes: activations half, parameters float32."""
    activations = ("x", "dt", "z", "B", "C", "hidden", "residual")
    for name, dtype in itertools.product(OPS, (torch.bfloat16, torch.float16)):
        op, inputs = example(name)
        narrow = {
            k: v.detach().to(dtype).requires_grad_()
            if k in activations and v.is_floating_point()
            else v
            for k, v in inputs.items()
        }
        for result in call(op, narrow):
            real = torch.view_as_real(result) if result.is_complex() else result
            assert torch.isfinite(real).all(), name
