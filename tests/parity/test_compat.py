"""The functions of `mamba_ssm` and `causal_conv1d`, outputs and gradients, against their definition in float64."""

from __future__ import annotations

import inspect

import official
import pytest
import torch
from accuracy import device_of
from torch import Tensor

from mambakit.compat import selective_scan_cuda
from mambakit.compat.causal_conv1d import causal_conv1d_interface as conv_interface
from mambakit.compat.causal_conv1d import cpp_functions
from mambakit.compat.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
from mambakit.compat.mamba_ssm.ops import mamba_inner
from mambakit.compat.mamba_ssm.ops.selective_scan_interface import (
    MambaInnerFn,
    SelectiveScanFn,
    mamba_inner_fn,
    mamba_inner_ref,
    rms_norm_forward,
    selective_scan_fn,
    selective_scan_ref,
)
from mambakit.compat.mamba_ssm.ops.triton.selective_state_update import (
    selective_state_update,
    selective_state_update_ref,
)
from mambakit.errors import ShapeError

HALF = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error relative to the largest number of a tensor."""


def leaves(inputs, device, wide=False):
    """The tensors among the inputs as leaves, in their dtypes on a device or in float64 on the CPU."""

    def leaf(value):
        if not isinstance(value, Tensor):
            return value
        kind = torch.complex128 if value.is_complex() else torch.float64
        value = value.detach().to(kind) if wide else value.detach().to(device)
        return value.clone(memory_format=torch.preserve_format).requires_grad_()

    return {name: leaf(value) for name, value in inputs.items()}


def gradients(inputs):
    return {k: v.grad.cpu() for k, v in inputs.items() if isinstance(v, Tensor)}


def assert_near(found, expected, dtype, name=""):
    expected, found = expected.detach(), found.detach().cpu().to(expected.dtype)
    assert found.shape == expected.shape, name
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < HALF[dtype], f"{name}: relative error {error:.1e}"


def compare(
    function, definition, inputs, backend, dtype=torch.float32, pick=lambda outputs: outputs
):
    """All outputs, and the gradients of all inputs for random gradients of the outputs."""
    ours, theirs = leaves(inputs, device_of(backend)), leaves(inputs, "cpu", wide=True)
    outputs, expected = pick(function(**ours)), definition(**theirs)
    outputs, expected = (o if isinstance(o, tuple) else (o,) for o in (outputs, expected))
    assert len(outputs) == len(expected)
    weights = [torch.randn_like(e.detach()) for e in expected]
    torch.autograd.backward(outputs, [w.to(o) for w, o in zip(weights, outputs, strict=True)])
    torch.autograd.backward(expected, weights)
    for i, (o, e) in enumerate(zip(outputs, expected, strict=True)):
        assert_near(o, e, dtype, f"output {i}")
    wanted = gradients(theirs)
    for name, gradient in gradients(ours).items():
        assert gradient.dtype == inputs[name].dtype
        assert_near(gradient, wanted[name], dtype, f"gradient of {name}")


def scan_inputs(
    seqlen=37,
    dim=6,
    dtype=torch.float32,
    groups=1,
    constant="",
    is_complex=False,
    is_last=False,
    **absent,
):
    batch, d_state = 2, 5
    A = -0.5 * torch.rand(dim, d_state) - 0.1
    length = 2 * seqlen if is_complex else seqlen
    if is_complex:
        A = torch.complex(A, torch.randn(dim, d_state))

    def weight(name):
        if name in constant:
            return torch.randn(dim, d_state, dtype=A.dtype)
        shape = (batch, d_state, length) if groups == 1 else (batch, groups, d_state, length)
        return torch.randn(*shape, dtype=dtype)

    def along():
        if is_last:  # As a matrix product followed by a transpose leaves it.
            return torch.randn(batch, seqlen, dim, dtype=dtype).transpose(1, 2)
        return torch.randn(batch, dim, seqlen, dtype=dtype)

    return {
        "u": along(), "delta": 0.5 * along().abs(), "A": A, "B": weight("B"), "C": weight("C"), "D": torch.randn(dim),
        "z": along(), "delta_bias": 0.5 * torch.rand(dim), "delta_softplus": True, **absent,
    }  # fmt: skip


SCANS = {
    "all": {},
    "channels last": {"is_last": True},
    "one step": {"seqlen": 1},
    "128": {"seqlen": 128},
    "no D": {"D": None},
    "no z": {"z": None},
    "no bias": {"delta_bias": None},
    "no softplus": {"delta_softplus": False, "delta_bias": None},
    "bare": {"D": None, "z": None, "delta_bias": None, "delta_softplus": False},
    "groups": {"groups": 2},
    "groups, channels last": {"groups": 3, "is_last": True},
    "constant B": {"constant": "B"},
    "constant C": {"constant": "C"},
    "constant B and C": {"constant": "BC"},
    "complex": {"is_complex": True},
    "complex, groups": {"is_complex": True, "groups": 2},
    "complex, constant B": {"is_complex": True, "constant": "B"},
    "complex, bare": {"is_complex": True, "D": None, "z": None, "delta_bias": None},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16, "groups": 2},
}


@pytest.mark.parametrize("case", SCANS)
def test_selective_scan_fn(case, backend):
    inputs = scan_inputs(**SCANS[case])
    dtype = inputs["u"].dtype
    compare(
        lambda **kw: selective_scan_fn(**kw, return_last_state=True),
        official.scan,
        inputs,
        backend,
        dtype,
    )


def test_selective_scan_fn_without_the_state():
    inputs = scan_inputs()
    out = selective_scan_fn(*inputs.values())
    expected, _ = selective_scan_fn(*inputs.values(), True)
    assert torch.equal(out, expected)
    assert torch.equal(SelectiveScanFn.apply(*inputs.values()), expected)


def test_selective_scan_ref():
    compare(
        lambda **kw: selective_scan_ref(**kw, return_last_state=True),
        official.scan,
        scan_inputs(),
        "cpu",
    )
    assert isinstance(selective_scan_ref(*scan_inputs().values()), Tensor)


@pytest.mark.parametrize("case", ["all", "no z", "no D", "bare", "constant B", "groups"])
def test_selective_scan_cuda(case, backend):
    device = device_of(backend)
    inputs = scan_inputs(**SCANS[case])
    ours = [v.to(device) if isinstance(v, Tensor) else v for v in inputs.values()]
    *tensors, delta_softplus = ours
    z, dout = tensors[6], torch.randn_like(tensors[0])
    out, x, *out_z = selective_scan_cuda.fwd(*tensors, delta_softplus)
    expected, state = official.scan(**{**inputs, "z": None})
    assert_near(out, expected, torch.float32)
    assert_near(x[:, :, -1, 1::2], state, torch.float32)
    assert len(out_z) == (z is not None)

    leaf = leaves(inputs, device)
    y = selective_scan_fn(**leaf)
    y.backward(dout)
    dz = None if z is None else torch.empty_like(z)
    found = selective_scan_cuda.bwd(*tensors, dout, x, out, dz, delta_softplus, True)
    order = ["u", "delta", "A", "B", "C", "D", "delta_bias", *(["z"] if z is not None else [])]
    for name, gradient in zip(order, found, strict=False):
        if inputs[name] is None:
            assert gradient is None
        else:
            assert torch.equal(gradient, leaf[name].grad), name
    assert len(found) == len(order) + (z is not None)
    if z is not None:
        assert found[7] is dz
        assert torch.equal(found[8], y)
        assert torch.equal(out_z[0], y)


def inner_inputs(dtype=torch.float32, is_complex=False, constant="", norms=(), d_state=5, **extra):
    batch, dim, rank, width, d_model, seqlen = 2, 12, 3, 3, 7, 19
    numbers = 2 * d_state if is_complex else d_state
    A = -0.5 * torch.rand(dim, d_state) - 0.1
    A = torch.complex(A, torch.randn(dim, d_state)) if is_complex else A
    rows = rank + sum(numbers for name in "BC" if name not in constant)
    inputs = {
        "xz": torch.randn(batch, seqlen, 2 * dim, dtype=dtype).transpose(1, 2),
        "conv1d_weight": torch.randn(dim, 1, width, dtype=dtype),
        "conv1d_bias": torch.randn(dim, dtype=dtype),
        "x_proj_weight": torch.randn(rows, dim, dtype=dtype) / dim**0.5,
        "delta_proj_weight": torch.randn(dim, rank, dtype=dtype),
        "out_proj_weight": torch.randn(d_model, dim, dtype=dtype),
        "out_proj_bias": torch.randn(d_model, dtype=dtype),
        "A": A, "D": torch.randn(dim), "delta_bias": torch.rand(dim),
        **{name: torch.randn(dim, d_state, dtype=A.dtype) for name in constant},
    }  # fmt: skip
    sizes = {"b_rms_weight": d_state, "c_rms_weight": d_state, "dt_rms_weight": rank}
    return {**inputs, **{name: 1 + 0.3 * torch.randn(sizes[name]) for name in norms}, **extra}


INNERS = {
    "all": {},
    "no biases": {"out_proj_bias": None, "conv1d_bias": None, "D": None, "delta_bias": None},
    "no softplus": {"delta_softplus": False, "delta_proj_weight": 0.1 * torch.rand(12, 3)},
    "constant B": {"constant": "B"},
    "constant C": {"constant": "C"},
    "constant B and C": {"constant": "BC"},
    "biases of B and C": {"B_proj_bias": torch.randn(5), "C_proj_bias": torch.randn(5)},
    "complex": {"is_complex": True},
    "complex, constant B": {"is_complex": True, "constant": "B"},
    "norm of B": {"norms": ("b_rms_weight",)},
    "norm of C": {"norms": ("c_rms_weight",)},
    "norm of dt": {"norms": ("dt_rms_weight",)},
    "all norms": {"norms": ("b_rms_weight", "c_rms_weight", "dt_rms_weight"), "b_c_dt_rms_eps": 1e-2},
    "as transformers calls FalconMamba": {
        "norms": ("b_rms_weight", "c_rms_weight"), "dt_rms_weight": 1 + 0.3 * torch.rand(12),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", INNERS)
def test_mamba_inner_fn(case, backend):
    compare(mamba_inner_fn, official.inner, inner_inputs(**INNERS[case]), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mamba_inner_fn_in_half_precision(dtype, backend):
    inputs = inner_inputs(dtype)
    inputs["out_proj_bias"] = inputs["out_proj_bias"].float()  # As transformers gives it.
    device = device_of(backend)
    out = mamba_inner_fn(**{k: v.to(device) for k, v in inputs.items()})
    assert out.dtype == dtype
    assert_near(out, official.inner(**{k: v.double() for k, v in inputs.items()}), torch.bfloat16)


def test_mamba_inner_fn_keeps_or_makes_again_the_same(backend, monkeypatch):
    monkeypatch.setattr(mamba_inner, "RECOMPUTES_ON", (backend,))
    results = []
    inputs = inner_inputs(norms=("dt_rms_weight",))
    for level in (0, 1):
        leaf = leaves(inputs, device_of(backend))
        mamba_inner_fn(**leaf, checkpoint_lvl=level).square().sum().backward()
        results.append(gradients(leaf))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_mamba_inner_ref():
    inputs = inner_inputs()
    compare(mamba_inner_ref, official.inner, inputs, "cpu")
    names = [*inspect.signature(mamba_inner_fn).parameters][:12]
    in_order = [inputs.get(name) for name in names]
    assert torch.equal(MambaInnerFn.apply(*in_order), mamba_inner_fn(**inputs))


def test_rms_norm_forward():
    x, weight, bias = torch.randn(4, 7), torch.randn(7), torch.randn(7)
    expected = official.rms(x, weight, 1e-6)
    torch.testing.assert_close(rms_norm_forward(x, weight, None), expected)
    torch.testing.assert_close(rms_norm_forward(x, weight, bias), expected + bias)
    expected = torch.nn.functional.layer_norm(x, (7,), weight, bias, 1e-3)
    torch.testing.assert_close(rms_norm_forward(x, weight, bias, 1e-3, False), expected)


def step_inputs(dtype=torch.float32, heads=None, groups=None, **absent):
    shape = (10,) if heads is None else (heads, 5)
    d_state, batch = 4, 3
    state = torch.randn(batch, *shape, d_state, dtype=dtype)
    inputs = {
        "x": torch.randn(batch, *shape, dtype=dtype), "dt": torch.randn(batch, *shape, dtype=dtype),
        "A": -torch.rand(*shape, d_state) - 1, "D": torch.randn(*shape), "z": torch.randn(batch, *shape, dtype=dtype),
        "dt_bias": torch.rand(*shape) - 1, "dt_softplus": True,
        **{name: torch.randn(batch, *([groups] if groups else []), d_state) for name in "BC"},
    }  # fmt: skip
    return state, {**inputs, **absent}


STEPS = {
    "all": {},
    "no D": {"D": None},
    "no z": {"z": None},
    "no bias": {"dt_bias": None},
    "bare": {"D": None, "z": None, "dt_bias": None, "dt_softplus": False},
    "groups": {"groups": 2},
    "heads": {"heads": 4, "groups": 2},
    "heads, one group": {"heads": 4},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
}


def expected_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """By the definition of the whole scan, which starts in this state through a step before."""

    def flat(tensor, dims):
        return None if tensor is None else tensor.double().flatten(dims)

    h, A = state.double().flatten(1, -2), A.double().flatten(0, -2)
    x, dt, z, D, bias = flat(x, 1), flat(dt, 1), flat(z, 1), flat(D, 0), flat(dt_bias, 0)
    dt = dt if bias is None else dt + bias
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    B, C = ((w[:, None] if w.ndim == 2 else w).double() for w in (B, C))
    B, C = (w.repeat_interleave(x.shape[1] // w.shape[1], dim=1) for w in (B, C))
    h = torch.exp(dt[..., None] * A) * h + (dt * x)[..., None] * B
    y = (h * C).sum(-1)
    y = y if D is None else y + D * x
    return (y if z is None else y * torch.nn.functional.silu(z)), h


@pytest.mark.parametrize("case", STEPS)
def test_selective_state_update(case, backend):
    state, inputs = step_inputs(**STEPS[case])
    expected, expected_state = expected_step(state, **inputs)
    device, dtype = device_of(backend), inputs["x"].dtype
    ours = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    found_state = state.to(device, copy=True)
    y = selective_state_update(found_state, **ours)
    assert y.dtype == dtype
    assert_near(y, expected.view(y.shape), dtype)
    assert_near(found_state, expected_state.view(state.shape), dtype)
    if backend == "cpu":
        y = selective_state_update_ref(state, **inputs)
        assert_near(y, expected.view(y.shape), dtype)
        assert_near(state, expected_state.view(state.shape), dtype)


@pytest.mark.parametrize("case", ["all", "heads", "bfloat16"])
def test_selective_state_update_of_chosen_rows(case, backend):
    _, inputs = step_inputs(**STEPS[case])
    device = device_of(backend)
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    shape = (7, *inputs["A"].shape)
    pool = torch.randn(shape, dtype=inputs["x"].dtype, device=device)
    before = pool.clone()
    rows = torch.tensor([5, 0, 2], dtype=torch.int32, device=device)
    y = selective_state_update(pool, **inputs, state_batch_indices=rows)
    chosen = before[rows.long()].contiguous()
    assert torch.equal(y, selective_state_update(chosen, **inputs))
    assert torch.equal(pool[rows.long()], chosen)
    others = [1, 3, 4, 6]
    assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize(
    "seqlen",
    [128, pytest.param(1024, marks=pytest.mark.slow), pytest.param(4096, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_scan_at_the_sizes_of_the_authors_tests(seqlen, groups, backend):
    inputs = scan_inputs(seqlen=seqlen, dim=4, groups=groups)
    device = device_of(backend)
    ours, theirs = leaves(inputs, device), leaves(inputs, device)
    found, state = selective_scan_fn(**ours, return_last_state=True)
    expected, expected_state = selective_scan_ref(**theirs, return_last_state=True)
    torch.testing.assert_close(found, expected, rtol=6e-4, atol=2e-3)
    torch.testing.assert_close(state, expected_state, rtol=6e-4, atol=2e-3)
    g = torch.randn_like(found)
    found.backward(g)
    expected.backward(g)
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(
            gradient, theirs[name].grad.cpu(), rtol=1e-3, atol=2e-3, msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_z", [False, True])
@pytest.mark.parametrize(("dim", "d_state"), [(2064, 16), (2048, 64)])
def test_step_at_the_sizes_of_the_authors_tests(dim, d_state, has_z, dtype, backend):
    device = device_of(backend)
    tolerance = {
        torch.float32: {"rtol": 3e-4, "atol": 1e-3}, torch.float16: {"rtol": 5e-3, "atol": 1e-2},
        torch.bfloat16: {"rtol": 1e-2, "atol": 5e-2},
    }[dtype]  # fmt: skip
    made = {"device": device, "dtype": dtype}
    state, x, dt = (torch.randn(2, *shape, **made) for shape in ((dim, d_state), (dim,), (dim,)))
    dt_bias, A = torch.rand(dim, device=device) - 4, -torch.rand(dim, d_state, device=device) - 1
    B, C = torch.randn(2, 2, d_state, device=device)
    D, z = torch.randn(dim, device=device), torch.randn_like(x) if has_z else None
    reference_state = state.clone()
    arguments = (x, dt, A, B, C, D, z, dt_bias, True)
    found = selective_state_update(state, *arguments)
    expected = selective_state_update_ref(reference_state, *arguments)
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(state, reference_state, **tolerance)


def test_selective_state_update_of_a_state_that_is_not_contiguous():
    state, inputs = step_inputs()
    strided = torch.randn(3, 4, 10).transpose(1, 2).copy_(state)
    assert not strided.is_contiguous()
    assert torch.equal(
        selective_state_update(strided, **inputs), selective_state_update(state, **inputs)
    )
    assert torch.equal(strided, state)


def test_selective_state_update_has_no_gradient_and_asks_for_none():
    state, inputs = step_inputs()
    inputs["A"].requires_grad_()
    assert not selective_state_update(state, **inputs).requires_grad


def test_selective_state_update_refuses_other_shapes():
    state, inputs = step_inputs()
    with pytest.raises(ShapeError, match=r"state: got shape \(10, 4\), wanted"):
        selective_state_update(state[0], **inputs)


def conv_inputs(seqlen=37, dim=6, width=4, dtype=torch.float32, is_last=False, **absent):
    shape = (2, seqlen, dim)
    x = torch.randn(shape, dtype=dtype)
    return {
        "x": x.transpose(1, 2) if is_last else x.transpose(1, 2).contiguous(),
        "weight": torch.randn(dim, width), "bias": torch.randn(dim),
        "initial_states": torch.randn(2, dim, width - 1, dtype=dtype), "activation": "silu", **absent,
    }  # fmt: skip


CONVS = {
    "all": {},
    "channels last": {"is_last": True},
    "shorter than the filter": {"seqlen": 2},
    "one step": {"seqlen": 1, "width": 3},
    "width 2": {"width": 2},
    "no bias": {"bias": None},
    "no activation": {"activation": None},
    "no initial states": {"initial_states": None},
    "bare": {"bias": None, "activation": None, "initial_states": None},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16, "is_last": True},
}


@pytest.mark.parametrize("case", CONVS)
def test_causal_conv1d_fn(case, backend):
    inputs = conv_inputs(**CONVS[case])
    dtype = inputs["x"].dtype

    def function(**kw):
        return conv_interface.causal_conv1d_fn(**kw, return_final_states=True)

    compare(function, official.conv, inputs, backend, dtype)
    if backend == "cpu":

        def reference(**kw):
            return conv_interface.causal_conv1d_ref(**kw, return_final_states=True)

        compare(reference, official.conv, inputs, backend, dtype)


def test_swish_is_silu():
    x, weight = torch.randn(2, 6, 9), torch.randn(6, 4)
    swish = conv_interface.causal_conv1d_fn(x, weight, activation="swish")
    assert torch.equal(swish, conv_interface.causal_conv1d_fn(x, weight, activation="silu"))


def test_final_states_are_written_where_asked():
    inputs = conv_inputs()
    out = torch.empty(2, 6, 3)
    _, state = conv_interface.causal_conv1d_fn(
        **inputs, return_final_states=True, final_states_out=out
    )
    assert state is out
    assert torch.equal(out, inputs["x"][..., -3:])


@pytest.mark.parametrize(
    "function", [conv_interface.causal_conv1d_fn, conv_interface.causal_conv1d_ref]
)
def test_documents_and_padding(function):
    x, weight, bias = torch.randn(1, 6, 12), torch.randn(6, 4), torch.randn(6)
    seq_idx = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3], dtype=torch.int32)
    found = function(x, weight, bias, seq_idx=seq_idx, activation="silu")
    parts = [
        official.conv(part, weight, bias, activation="silu")[0]
        for part in (x[..., :5], x[..., 5:9])
    ]
    torch.testing.assert_close(found, torch.cat([*parts, torch.zeros(1, 6, 3)], dim=-1))


UPDATES = {
    "one position": {"seqlen": None},
    "several": {"seqlen": 5},
    "more than the state": {"seqlen": 9},
    "shortest state": {"seqlen": 4, "length": 3},
    "ring": {"seqlen": 2, "is_ring": True},
    "ring, one position": {"seqlen": None, "is_ring": True},
    "ring, more than the state": {"seqlen": 9, "is_ring": True},
    "bfloat16": {"seqlen": 5, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("case", UPDATES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_causal_conv1d_update(case, has_bias, backend):
    settings = {"length": 6, "is_ring": False, "dtype": torch.float32, **UPDATES[case]}
    batch, dim, width, length, dtype = 3, 6, 4, settings["length"], settings["dtype"]
    seqlen = settings["seqlen"] or 1
    inputs = torch.randn(batch, dim, 20 + seqlen, dtype=dtype)
    weight, bias = torch.randn(dim, width), torch.randn(dim) if has_bias else None
    device = device_of(backend)
    counts = torch.tensor([8, 20, 13], dtype=torch.int32)
    if settings["is_ring"]:
        # The input number i is at place i modulo the length.
        state = torch.stack([ring(inputs[b], int(counts[b]), length) for b in range(batch)])
        ends = counts.tolist()
    else:
        state, ends, counts = inputs[..., 20 - length : 20].clone(), [20] * batch, None
    x = torch.stack([inputs[b, :, end : end + seqlen] for b, end in enumerate(ends)])
    x = x if settings["seqlen"] else x[..., 0]
    found_state = state.to(device, copy=True)
    y = conv_interface.causal_conv1d_update(
        x.to(device), found_state, weight.to(device), None if bias is None else bias.to(device), "silu",
        None if counts is None else counts.to(device),
    )  # fmt: skip
    for b, end in enumerate(ends):
        before, now = inputs[b : b + 1, :, end - 3 : end], inputs[b : b + 1, :, end : end + seqlen]
        wide = [None if t is None else t.double() for t in (now, weight, bias, before)]
        expected = official.conv(*wide, activation="silu")[0][0]
        assert_near(y[b], expected if settings["seqlen"] else expected[:, 0], dtype)
        total = end + seqlen
        new = (
            ring(inputs[b], total, length)
            if settings["is_ring"]
            else inputs[b, :, total - length : total]
        )
        assert torch.equal(found_state[b].cpu(), new)
    if backend == "cpu":
        reference = conv_interface.causal_conv1d_update_ref(x, state, weight, bias, "silu", counts)
        assert_near(reference, y.double(), dtype)
        assert torch.equal(state, found_state)


def ring(inputs: Tensor, count: int, length: int) -> Tensor:
    state = inputs.new_zeros(inputs.shape[0], length)
    for i in range(max(count - length, 0), count):
        state[:, i % length] = inputs[:, i]
    return state


@pytest.mark.parametrize("rows", [[4, -1, 2, -1], [0, 3, -1, 1], [-1, -1, -1, -1], [3, 2, 1, 0]])
def test_causal_conv1d_update_of_chosen_rows(rows, backend):
    device = device_of(backend)
    x, pool = torch.randn(4, 6, 2, device=device), torch.randn(5, 6, 3, device=device)
    weight, before = torch.randn(6, 4, device=device), pool.clone()
    indices = torch.tensor(rows, dtype=torch.int32, device=device)
    y = conv_interface.causal_conv1d_update(x, pool, weight, conv_state_indices=indices)
    for i, row in enumerate(rows):
        if row < 0:
            assert not y[i].any()
        else:
            state = before[row : row + 1]
            alone = conv_interface.causal_conv1d_update(x[i : i + 1], state, weight)
            torch.testing.assert_close(y[i], alone[0])
            assert torch.equal(pool[row], state[0])
    for row in {*range(5)} - {*rows}:
        assert torch.equal(pool[row], before[row])


def test_causal_conv1d_update_refuses_a_short_state():
    with pytest.raises(ShapeError, match="conv_state: got 2 inputs, wanted at least 3"):
        conv_interface.causal_conv1d_update(
            torch.randn(1, 6), torch.randn(1, 6, 2), torch.randn(6, 4)
        )


def test_cpp_functions(backend):
    device = device_of(backend)
    inputs = conv_inputs()
    leaf = leaves(inputs, device)
    y, state = conv_interface.causal_conv1d_fn(**leaf, return_final_states=True)
    dy, dstate = torch.randn_like(y), torch.randn_like(state)
    torch.autograd.backward([y, state], [dy, dstate])
    x, weight, bias, initial = (leaf[k].detach() for k in ("x", "weight", "bias", "initial_states"))
    out = torch.empty_like(state)
    found = cpp_functions.causal_conv1d_fwd_function(x, weight, bias, None, initial, out, True)
    assert torch.equal(found, y)
    assert torch.equal(out, state)
    dx = torch.empty_like(x)
    arguments = (x, weight, bias, dy, None, initial)
    found = cpp_functions.causal_conv1d_bwd_function(*arguments, dstate, dx, True, True)
    assert found[0] is dx
    for name, gradient in zip(("x", "weight", "bias", "initial_states"), found, strict=True):
        assert torch.equal(gradient, leaf[name].grad), name
    found = cpp_functions.causal_conv1d_bwd_function(
        x, weight, None, dy, None, None, None, None, False, False
    )
    assert found[2:] == (None, None)
    state = initial.clone()
    y = cpp_functions.causal_conv1d_update_function(x, state, weight, None, False, None, None)
    assert torch.equal(y, conv_interface.causal_conv1d_update(x, initial, weight))


def test_varlen_states(backend):
    x = torch.randn(11, 3, device=device_of(backend))
    starts = torch.tensor([0, 2, 7, 11], device=x.device)
    found = causal_conv1d_varlen_states(x, starts, 4)
    expected = torch.zeros(3, 4, 3, device=x.device)
    expected[0, 2:], expected[1], expected[2] = x[:2], x[3:7], x[7:]
    assert torch.equal(found, expected.transpose(1, 2))
