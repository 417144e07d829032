from functools import partial

import pytest
import torch
from accuracy import Tensors, assert_accurate, run, widen
from torch import Tensor

from mambakit.ops import selective_scan, selective_scan_step

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ("x", "dt", "z", "B", "C")


def case(
    batch: int = 2,
    seqlen: int = 67,
    d_inner: int = 40,
    d_state: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    groups: int | None = None,
    constant: str = "",
    absent: tuple[str, ...] = (),
    is_complex: bool = False,
) -> Tensors:
    weight = torch.complex64 if is_complex else torch.float32
    states = (d_state,) if groups is None else (groups, d_state)
    A = -torch.rand(d_inner, d_state) * torch.arange(1, d_state + 1) - 0.01
    if is_complex:
        A = torch.complex(A, 3 * torch.randn_like(A))
    tensors = {
        "x": torch.randn(batch, seqlen, d_inner),
        "dt": torch.randn(batch, seqlen, d_inner) / 2 - 2,
        "A": A,
        "B": torch.randn(batch, seqlen, *states, dtype=weight),
        "C": torch.randn(batch, seqlen, *states, dtype=weight),
        "D": torch.randn(d_inner),
        "z": torch.randn(batch, seqlen, d_inner),
        "dt_bias": torch.randn(d_inner) / 10,
        "initial_state": torch.randn(batch, d_inner, d_state, dtype=weight),
    }
    for name in constant:
        tensors[name] = torch.randn(d_inner, d_state, dtype=weight)
    for name in ACTIVATIONS:
        if not tensors[name].is_complex():
            tensors[name] = tensors[name].to(dtype)
    return {k: None if k in absent else v for k, v in tensors.items()}


def documents(batch: int, seqlen: int) -> Tensor:
    """Runs of random lengths, one number used twice."""
    return (torch.rand(batch, seqlen) < 0.1).cumsum(1) % 3


@pytest.fixture(params=[False, True], ids=["real", "complex"])
def is_complex(request: pytest.FixtureRequest) -> bool:
    return request.param


scan = partial(selective_scan, dt_softplus=True)
OPTIONAL = ("D", "z", "dt_bias", "initial_state")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_present(dtype: torch.dtype, is_complex: bool) -> None:
    assert_accurate(
        partial(scan, seq_idx=documents(2, 67)), case(dtype=dtype, is_complex=is_complex), "cpu"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_absent(dtype: torch.dtype, is_complex: bool) -> None:
    inputs = case(dtype=dtype, absent=OPTIONAL, is_complex=is_complex)
    inputs["dt"] = inputs["dt"].abs()
    assert_accurate(selective_scan, inputs, "cpu")


@pytest.mark.parametrize("absent", [*OPTIONAL, "seq_idx", "dt_softplus"])
def test_one_option_absent(absent: str, is_complex: bool) -> None:
    inputs = case(absent=(absent,), is_complex=is_complex)
    if absent == "dt_softplus":
        inputs["dt"] = inputs["dt"].abs() + inputs["dt_bias"].abs().max()
    options = {"dt_softplus": absent != "dt_softplus"}
    if absent != "seq_idx":
        options["seq_idx"] = documents(2, 67)
    assert_accurate(partial(selective_scan, **options), inputs, "cpu")


@pytest.mark.parametrize("constant", ["B", "C", "BC"])
def test_constant_in_time(constant: str, is_complex: bool) -> None:
    assert_accurate(scan, case(constant=constant, is_complex=is_complex), "cpu")


@pytest.mark.parametrize("groups", [1, 4, 40])
def test_groups(groups: int, is_complex: bool) -> None:
    assert_accurate(scan, case(groups=groups, is_complex=is_complex), "cpu")


def test_groups_of_one_and_not_of_the_other() -> None:
    inputs = case(groups=4)
    inputs["C"] = inputs["C"][:, :, 0]
    assert_accurate(scan, inputs, "cpu")
    inputs["C"] = torch.randn(40, 5)
    assert_accurate(scan, inputs, "cpu")


@pytest.mark.parametrize("real", ["B", "C", "BC", "initial_state"])
def test_real_beside_complex_A(real: str) -> None:
    inputs = case(is_complex=True, constant="C" if real == "C" else "")
    for name in ["initial_state"] if real == "initial_state" else real:
        inputs[name] = inputs[name].real.contiguous()
    assert_accurate(scan, inputs, "cpu")


def test_lazy_conjugates() -> None:
    inputs = case(is_complex=True, absent=("initial_state",))
    views = {k: v.conj() if v is not None and v.is_complex() else v for k, v in inputs.items()}
    copies = {k: v if v is None else v.resolve_conj() for k, v in views.items()}
    for ours, expected in zip(
        scan(**views, backend="cpu"), scan(**copies, backend="cpu"), strict=True
    ):
        assert torch.equal(ours, expected)
    start = torch.randn(2, 40, 5, dtype=torch.complex64)
    states = [start, start.clone()]
    for state, tensors in zip(states, (views, copies), strict=True):
        now = {k: v[:, 0] if v is not None and v.ndim == 3 else v for k, v in tensors.items()}
        del now["initial_state"]
        selective_scan_step(state, **now, backend="cpu")
    assert torch.equal(*states)


@pytest.mark.parametrize("angle", [1e-3, 1.0, 1e3, 6e3])
def test_rotations(angle: float) -> None:
    """A state that only turns: of a step of length 1 the angle is exact, so what is seen is the error of exp."""
    angles = torch.linspace(-angle, angle, 999)[None].repeat(3, 1)
    A = torch.complex(torch.zeros(3, 999), angles)
    one, start = torch.ones(1, 1, 3), torch.ones(1, 3, 999, dtype=torch.complex64)
    nothing = torch.zeros(3, 999)
    _, scanned = selective_scan(one, one, A, nothing, nothing, initial_state=start, backend="cpu")
    stepped = start.clone()
    selective_scan_step(stepped, one[0], one[0], A, nothing[None], nothing[None], backend="cpu")
    truth = torch.exp(1j * angles.double())
    for state in (scanned, stepped):
        assert (state - truth).abs().max() <= 2 * 2**-24
        assert (state - truth).norm() <= 2**-24 * truth.norm()


@pytest.mark.parametrize("seqlen", [1, 15, 16, 63, 127, 257])
def test_lengths(seqlen: int, is_complex: bool) -> None:
    # Enough channels that the two errors, which are random, can be compared.
    assert_accurate(scan, case(3, seqlen, 64, 3, is_complex=is_complex), "cpu")


@pytest.mark.slow
def test_long_sequence() -> None:
    assert_accurate(scan, case(1, 4097, 16, 2), "cpu")


@pytest.mark.parametrize("d_inner", [1, 15, 17, 130, 300])
@pytest.mark.parametrize("batch", [1, 3])
def test_channels(batch: int, d_inner: int, is_complex: bool) -> None:
    """The error of one number, as the gradient of D is for one channel, is chance; so is that of a few."""
    absent = ("D", "dt_bias") if d_inner == 1 else ()
    inputs = case(batch, 21, d_inner, 32, absent=absent, is_complex=is_complex)
    assert_accurate(scan, inputs, "cpu")


@pytest.mark.parametrize("d_state", [1, 16, 64, 256])
def test_states(d_state: int, is_complex: bool) -> None:
    assert_accurate(scan, case(1, 19, 20, d_state, is_complex=is_complex), "cpu")


@pytest.mark.parametrize(("batch", "seqlen", "d_inner"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_to_scan(batch: int, seqlen: int, d_inner: int, is_complex: bool) -> None:
    inputs = case(batch, seqlen, d_inner, 2, is_complex=is_complex)
    for ours, expected in zip(
        scan(**inputs, backend="cpu"), scan(**inputs, backend="reference"), strict=True
    ):
        assert torch.equal(ours, expected)
    gradients = run(scan, inputs, "cpu")
    assert all(g.shape == inputs[k.split()[-1]].shape for k, g in gradients.items() if "of" in k)


def test_strided_views() -> None:
    """Halves of one projection, a transposed tensor and an expanded one give what copies give."""
    inputs = case(2, 33, 24, 4)
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
        scan(**views, backend="cpu"), scan(**copies, backend="cpu"), strict=True
    ):
        assert torch.equal(ours, expected)


def test_mixed_dtypes() -> None:
    inputs = case(dtype=torch.bfloat16)
    inputs["dt"] = inputs["dt"].float()
    assert_accurate(scan, inputs, "cpu")


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


def test_no_gradient_of_what_needs_none() -> None:
    inputs = {k: v.requires_grad_(k == "x") for k, v in case().items()}
    y, _ = scan(**inputs, backend="cpu")
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
def test_step(dtype: torch.dtype, absent: str, form: str, is_complex: bool) -> None:
    weight = torch.complex64 if is_complex else torch.float32
    A = -torch.rand(40, 5) * 4
    shape = {"shared": (3, 5), "groups": (3, 4, 5), "constant": (1, 40, 5)}[form]
    inputs = {
        "x": torch.randn(3, 40, dtype=dtype),
        "dt": torch.randn(3, 40, dtype=dtype),
        "A": torch.complex(A, torch.randn(40, 5)) if is_complex else A,
        "B": torch.randn(shape, dtype=weight),
        "C": torch.randn(shape, dtype=weight),
        "D": torch.randn(40),
        "z": torch.randn(3, 40, dtype=dtype),
        "dt_bias": torch.randn(40),
    }
    inputs.pop(absent, None)
    start = torch.randn(3, 40, 5, dtype=weight)

    def step(inputs: dict[str, Tensor], state: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        state = state.clone()
        y = selective_scan_step(state, **inputs, dt_softplus=True, backend=backend)
        return y, state

    exact = step({k: widen(v) for k, v in inputs.items()}, widen(start), "reference")
    ours, theirs = step(inputs, start, "cpu"), step(inputs, start, "reference")
    for got, reference, truth in zip(ours, theirs, exact, strict=True):
        assert got.dtype == reference.dtype
        allowed = 2 * (reference - truth).norm() + torch.finfo(got.dtype).eps / 2 * truth.norm()
        assert (got - truth).norm() <= allowed
