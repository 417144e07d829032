from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm

from mambakit.compat.mamba_ssm.ops.triton import layernorm
from mambakit.compat.mamba_ssm.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    rms_norm_fn,
)
from mambakit.errors import ArgumentError

WIDTH = 12


def rms(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@pytest.fixture
def tensors():
    names = ("x", "residual", "x1")
    along = {name: torch.randn(2, 5, WIDTH, requires_grad=True) for name in names}
    names = ("weight", "bias", "weight1", "bias1")
    return along | {name: torch.randn(WIDTH, requires_grad=True) for name in names}


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_x1", [False, True])
@pytest.mark.parametrize("has_second", [False, True])
def test_outputs_and_gradients(tensors, is_rms_norm, has_bias, has_residual, has_x1, has_second):
    given = {
        "bias": has_bias,
        "residual": has_residual,
        "x1": has_x1,
        "weight1": has_second,
        "bias1": has_second,
    }
    arguments = {name: tensors[name] if given.get(name, True) else None for name in tensors}
    outputs = layer_norm_fn(**arguments, eps=1e-3, prenorm=True, is_rms_norm=is_rms_norm)
    total = sum(arguments[name] for name in ("x", "residual", "x1") if arguments[name] is not None)

    def norm(weight, bias):
        if not is_rms_norm:
            return layer_norm(total, (WIDTH,), weight, bias, 1e-3)
        y = rms(total, weight, 1e-3)
        return y if bias is None else y + bias

    expected = [norm(arguments["weight"], arguments["bias"])]
    expected += [norm(arguments["weight1"], arguments["bias1"])] if has_second else []
    expected += [total]
    leaves = [t for t in arguments.values() if t is not None]
    weights = [torch.randn_like(t) for t in expected]
    for found, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(
        torch.autograd.grad(outputs, leaves, weights),
        torch.autograd.grad(expected, leaves, weights),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_comes_back(tensors):
    x, weight = tensors["x"], tensors["weight"]
    assert isinstance(layer_norm_fn(x, weight, None), torch.Tensor)
    y, mask, mask1 = rms_norm_fn(x, weight, None, return_dropout_mask=True)
    assert mask is None
    assert mask1 is None
    torch.testing.assert_close(y, rms(x, weight, 1e-6))


def test_rows_are_scaled(tensors):
    scale = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0]).expand(2, -1)
    _, stream = rms_norm_fn(tensors["x"], tensors["weight"], None, rowscale=scale, prenorm=True)
    torch.testing.assert_close(stream, tensors["x"] * scale[..., None])
    with pytest.raises(ArgumentError, match="rowscale: got one together with x1"):
        rms_norm_fn(tensors["x"], tensors["weight"], None, x1=tensors["x1"], rowscale=scale)


def test_dropout(tensors):
    x = torch.ones(50, WIDTH)
    outputs = rms_norm_fn(
        x, tensors["weight"], None, x1=2 * x, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    _, stream, mask, mask1 = outputs
    torch.testing.assert_close(stream, mask / 0.75 + 2 * mask1 / 0.75)
    assert 0.6 < mask.float().mean() < 0.9
    assert not torch.equal(mask, mask1)


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_dtypes(is_rms_norm, tensors):
    x, weight = torch.randn(3, WIDTH, dtype=torch.bfloat16), tensors["weight"].detach()
    kind = {"prenorm": True, "is_rms_norm": is_rms_norm}
    y, stream = layer_norm_fn(x, weight, None, residual_in_fp32=True, **kind)
    assert (y.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
    y, stream = layer_norm_fn(x, weight, None, **kind)
    assert (y.dtype, stream.dtype) == (torch.bfloat16, torch.bfloat16)
    y, stream = layer_norm_fn(x, weight, None, residual=torch.randn(3, WIDTH), **kind)
    assert (y.dtype, stream.dtype) == (torch.bfloat16, torch.float32)


def test_linear_after_it(tensors):
    x, weight, residual = (tensors[name] for name in ("x", "weight", "residual"))
    matrix, bias = torch.randn(7, WIDTH), torch.randn(7)
    expected = nn.functional.linear(
        layer_norm(x + residual, (WIDTH,), weight, None, 1e-6), matrix, bias
    )
    out, stream = layer_norm_linear_fn(x, weight, None, matrix, bias, residual, prenorm=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stream, x + residual)
    out = layer_norm_linear_fn(x, weight, None, matrix, None, is_rms_norm=True)
    torch.testing.assert_close(out, rms(x, weight, 1e-6) @ matrix.T, rtol=1e-4, atol=1e-4)


def test_module(tensors):
    norm = RMSNorm(WIDTH, eps=1e-2, dtype=torch.float64, device="cpu")
    assert norm.weight.dtype == torch.float64
    assert [*norm.state_dict()] == ["weight"]
    assert norm.bias is None
    norm = RMSNorm(WIDTH, eps=1e-2)
    norm.weight.data.copy_(tensors["weight"])
    y, stream = norm(tensors["x"], tensors["residual"], prenorm=True)
    total = tensors["x"] + tensors["residual"]
    torch.testing.assert_close(y, rms(total, norm.weight, 1e-2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stream, total)
    norm.reset_parameters()
    assert (norm.weight == 1).all()


def test_module_drops_in_training_only(tensors):
    norm = RMSNorm(WIDTH, dropout_p=0.5)
    x = tensors["x"]
    assert (norm(x) == 0).any()
    assert not (norm.eval()(x) == 0).any()


def test_older_name():
    assert layernorm.rms_norm_fn is rms_norm_fn
    assert layernorm.RMSNorm is RMSNorm
