from functools import partial

import pytest
import torch
from accuracy import assert_accurate, device_of, on_device_of, run, widen
from scan_inputs import DTYPES, OPTIONAL, case, documents
from torch import Tensor

from mambakit.ops import selective_scan, selective_scan_step


@pytest.fixture(params=[False, True], ids=["real", "complex"])
def is_complex(request: pytest.FixtureRequest) -> bool:
    return request.param


scan = partial(selective_scan, dt_softplus=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_present(backend: str, dtype: torch.dtype, is_complex: bool) -> None:
    inputs = case(dtype=dtype, is_complex=is_complex)
    assert_accurate(scan, {**inputs, "seq_idx": documents(2, 67)}, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_absent(backend: str, dtype: torch.dtype, is_complex: bool) -> None:
    inputs = case(dtype=dtype, absent=OPTIONAL, is_complex=is_complex)
    inputs["dt"] = inputs["dt"].abs()
    assert_accurate(selective_scan, inputs, backend)


@pytest.mark.parametrize("absent", [*OPTIONAL, "seq_idx", "dt_softplus"])
def test_one_option_absent(backend: str, absent: str, is_complex: bool) -> None:
    inputs = case(absent=(absent,), is_complex=is_complex)
    if absent == "dt_softplus":
        inputs["dt"] = inputs["dt"].abs() + inputs["dt_bias"].abs().max()
    if absent != "seq_idx":
        inputs["seq_idx"] = documents(2, 67)
    assert_accurate(partial(selective_scan, dt_softplus=absent != "dt_softplus"), inputs, backend)


@pytest.mark.parametrize("constant", ["B", "C", "BC"])
def test_constant_in_time(backend: str, constant: str, is_complex: bool) -> None:
    assert_accurate(scan, case(constant=constant, is_complex=is_complex), backend)


@pytest.mark.parametrize("groups", [1, 4, 96])
def test_groups(backend: str, groups: int, is_complex: bool) -> None:
    assert_accurate(scan, case(groups=groups, is_complex=is_complex), backend)


def test_groups_of_one_and_not_of_the_other(backend: str) -> None:
    inputs = case(groups=4)
    inputs["C"] = inputs["C"][:, :, 0]
    assert_accurate(scan, inputs, backend)
    inputs["C"] = torch.randn(96, 5)
    assert_accurate(scan, inputs, backend)


@pytest.mark.parametrize("real", ["B", "C", "BC", "initial_state"])
def test_real_beside_complex_A(backend: str, real: str) -> None:
    inputs = case(is_complex=True, constant="C" if real == "C" else "")
    for name in ["initial_state"] if real == "initial_state" else real:
        inputs[name] = inputs[name].real.contiguous()
    assert_accurate(scan, inputs, backend)


def test_lazy_conjugates(backend: str) -> None:
    inputs = on_device_of(backend, case(is_complex=True, absent=("initial_state",)))
    views = {k: v.conj() if v is not None and v.is_complex() else v for k, v in inputs.items()}
    copies = {k: v if v is None else v.resolve_conj() for k, v in views.items()}
    for ours, expected in zip(
        scan(**views, backend=backend), scan(**copies, backend=backend), strict=True
    ):
        assert torch.equal(ours, expected)
    start = torch.randn(2, 96, 5, dtype=torch.complex64, device=device_of(backend))
    states = [start, start.clone()]
    for state, tensors in zip(states, (views, copies), strict=True):
        now = {k: v[:, 0] if v is not None and v.ndim == 3 else v for k, v in tensors.items()}
        del now["initial_state"]
        selective_scan_step(state, **now, backend=backend)
    assert torch.equal(*states)


@pytest.mark.parametrize("angle", [1e-3, 1.0, 1e3, 6e3])
def test_rotations(backend: str, angle: float) -> None:
    """A state that only turns: of a step of length 1 the angle is exact, so what is seen is the error of exp."""
    angles = torch.linspace(-angle, angle, 999)[None].repeat(3, 1)
    with device_of(backend):
        A = torch.complex(torch.zeros(3, 999), torch.as_tensor(angles))
        one, start = torch.ones(1, 1, 3), torch.ones(1, 3, 999, dtype=torch.complex64)
        nothing = torch.zeros(3, 999)
    _, scanned = selective_scan(one, one, A, nothing, nothing, initial_state=start, backend=backend)
    stepped = start.clone()
    selective_scan_step(stepped, one[0], one[0], A, nothing[None], nothing[None], backend=backend)
    truth = torch.exp(1j * angles.double())
    for state in (scanned.cpu(), stepped.cpu()):
        assert (state - truth).abs().max() <= 2 * 2**-24
        assert (state - truth).norm() <= 2**-24 * truth.norm()


@pytest.mark.parametrize("seqlen", [1, 15, 16, 63, 127, 257])
def test_lengths(backend: str, seqlen: int, is_complex: bool) -> None:
    # Enough channels that the two errors, which are random, can be compared.
    assert_accurate(scan, case(3, seqlen, 256, 3, is_complex=is_complex), backend)


@pytest.mark.slow
def test_long_sequence(backend: str) -> None:
    assert_accurate(scan, case(1, 4097, 64, 2), backend)


@pytest.mark.parametrize("d_inner", [1, 15, 17, 130, 300])
@pytest.mark.parametrize("batch", [1, 3])
def test_channels(backend: str, batch: int, d_inner: int, is_complex: bool) -> None:
    draws = [
        case(batch, 21, d_inner, 32, is_complex=is_complex) for _ in range(max(1, 240 // d_inner))
    ]
    assert_accurate(scan, draws, backend)


@pytest.mark.parametrize("d_state", [1, 16, 64, 256])
def test_states(backend: str, d_state: int, is_complex: bool) -> None:
    assert_accurate(scan, case(1, 19, d_state=d_state, is_complex=is_complex), backend)


@pytest.mark.parametrize(("batch", "seqlen", "d_inner"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_to_scan(
    backend: str, batch: int, seqlen: int, d_inner: int, is_complex: bool
) -> None:
    inputs = case(batch, seqlen, d_inner, 2, is_complex=is_complex)
    ours, expected = run(scan, inputs, backend), scan(**inputs, backend="reference")
    assert all(torch.equal(ours[f"output {i}"], expected[i]) for i in (0, 1))
    assert all(g.shape == inputs[k.split()[-1]].shape for k, g in ours.items() if "of" in k)


def test_strided_views(backend: str) -> None:
    """Halves of one projection, a transposed tensor and an expanded one give what copies give."""
    inputs = on_device_of(backend, case(2, 33, 24, 4))
    both = torch.cat([inputs["x"], inputs["z"]], dim=-1)
    views = {
        **inputs,
        "x": both[..., :24],
        "z": both[..., 24:],
        "dt": inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2),
        "B": inputs["B"][:1].expand(2, -1, -1),
    }
    copies = {k: v.contiguous() for k, v in views.items()}
    for ours, expected in zip(
        scan(**views, backend=backend), scan(**copies, backend=backend), strict=True
    ):
        assert torch.equal(ours, expected)


def test_mixed_dtypes(backend: str) -> None:
    inputs = case(dtype=torch.bfloat16)
    inputs["dt"] = inputs["dt"].float()
    assert_accurate(scan, inputs, backend)


def test_gradients_are_the_same_bits_every_time_and_for_any_number_of_threads(
    is_complex: bool,
) -> None:
    inputs = case(2, 50, 140, 4, is_complex=is_complex)
    threads = torch.get_num_threads()
    first = run(scan, inputs, "cpu")
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            again = run(scan, inputs, "cpu")
            assert all(torch.equal(again[name], first[name]) for name in first)
    finally:
        torch.set_num_threads(threads)


def test_no_gradient_of_what_needs_none(backend: str) -> None:
    tensors = on_device_of(backend, case())
    inputs = {k: v.requires_grad_(k == "x") for k, v in tensors.items()}
    y, _ = scan(**inputs, backend=backend)
    y.sum().backward()
    assert inputs["x"].grad is not None
    assert inputs["A"].grad is None


def test_reference_gradients_twice() -> None:
    inputs = {k: widen(v).requires_grad_() for k, v in case(1, 4, 2, 2).items()}
    names = list(inputs)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, values, strict=True))
        return scan(**named, seq_idx=torch.tensor([[0, 0, 1, 1]]), backend="reference")

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()))


def test_reference_gradients_of_complex_A() -> None:
    inputs = {k: widen(v).requires_grad_() for k, v in case(1, 3, 2, 2, is_complex=True).items()}
    names = list(inputs)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return scan(**dict(zip(names, values, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("form", ["shared", "groups", "constant"])
@pytest.mark.parametrize("absent", ["none", "D", "z", "dt_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(backend: str, dtype: torch.dtype, absent: str, form: str, is_complex: bool) -> None:
    weight = torch.complex64 if is_complex else torch.float32
    A = -torch.rand(96, 5) * 4
    shape = {"shared": (3, 5), "groups": (3, 4, 5), "constant": (1, 96, 5)}[form]
    inputs = {
        "x": torch.randn(3, 96, dtype=dtype),
        "dt": torch.randn(3, 96, dtype=dtype),
        "A": torch.complex(A, torch.randn(96, 5)) if is_complex else A,
        "B": torch.randn(shape, dtype=weight),
        "C": torch.randn(shape, dtype=weight),
        "D": torch.randn(96),
        "z": torch.randn(3, 96, dtype=dtype),
        "dt_bias": torch.randn(96),
    }
    inputs.pop(absent, None)
    start = torch.randn(3, 96, 5, dtype=weight)

    def step(inputs: dict[str, Tensor], state: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        state = state.to(device_of(backend), copy=True)
        inputs = on_device_of(backend, inputs)
        y = selective_scan_step(state, **inputs, dt_softplus=True, backend=backend)
        return y.cpu(), state.cpu()

    exact = step({k: widen(v) for k, v in inputs.items()}, widen(start), "reference")
    ours, theirs = step(inputs, start, backend), step(inputs, start, "reference")
    for got, reference, truth in zip(ours, theirs, exact, strict=True):
        assert got.dtype == reference.dtype
        allowed = 2 * (reference - truth).norm() + torch.finfo(got.dtype).eps / 2 * truth.norm()
        assert (got - truth).norm() <= allowed
