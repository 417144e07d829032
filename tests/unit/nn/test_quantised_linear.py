from __future__ import annotations

import copy

import torch
from torch import nn

from mambakit.nn.quantised_linear import QuantisedDtProjection, QuantisedEmbedding, QuantisedLinear
from mambakit.ops.quantisation import dequantise, quantise_weight


def make(kind: type[QuantisedLinear] = QuantisedLinear, bits: int = 8) -> QuantisedLinear:
    torch.manual_seed(0)
    bias = nn.Parameter(torch.randn(12))
    return kind(quantise_weight(torch.randn(12, 30), bits, 32), bias)


def test_the_layer_is_its_product() -> None:
    layer, x = make(), torch.randn(2, 3, 30)
    expected = x @ dequantise(layer.matrix, torch.float32).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)


def test_the_bias_of_dt_is_left_to_the_scan() -> None:
    layer, x = make(QuantisedDtProjection), torch.randn(5, 30)
    expected = x @ dequantise(layer.matrix, torch.float32).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)


def test_a_cast_leaves_codes_and_scales() -> None:
    layer = make()
    before = copy.deepcopy(layer)
    layer.double()
    assert layer.bias.dtype == torch.float64
    assert layer.codes.dtype == torch.int8
    assert layer.scales.dtype == torch.bfloat16
    assert torch.equal(layer.scales, before.scales)
    assert layer.half()(torch.randn(2, 30).half()).dtype == torch.float16


def test_nothing_but_the_bias_is_a_parameter() -> None:
    layer = make()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert sorted(layer.state_dict()) == ["bias", "codes", "scales"]
    assert repr(make(bits=4)) == (
        "QuantisedLinear(in_features=30, out_features=12, bias=True, bits=4, group_size=32)"
    )


def test_an_embedding_is_rows_of_the_matrix() -> None:
    embedding = QuantisedEmbedding(make(bits=4))
    rows = dequantise(embedding.table.matrix, torch.float32)
    ids = torch.tensor([[3, 0, 11], [3, 3, 1]], dtype=torch.int32)
    assert torch.equal(embedding(ids), rows[ids.long()])
    assert torch.equal(embedding.bfloat16()(ids), rows.bfloat16()[ids.long()])
    assert embedding(ids[0, 0]).shape == (30,)
