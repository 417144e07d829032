from __future__ import annotations

import pytest
import torch

from mambakit.errors import ArgumentError, DtypeError, ShapeError
from mambakit.ops.quantisation import QuantisedWeight, dequantise, quantise_weight

FORMS = [(bits, group_size) for bits in (8, 4) for group_size in (32, 64, 128)]


@pytest.mark.parametrize("columns", [1, 48, 64, 130, 256])
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_what_the_codes_can_say_is_kept_exactly(bits: int, group_size: int, columns: int) -> None:
    lowest = -(2 ** (bits - 1))
    codes = torch.randint(lowest, -lowest, (5, columns))
    codes[:, ::32] = lowest  # the largest of every group, so that the scale is found again
    weight = codes * torch.tensor([0.5, -2.0, 1.0, 1e-9, 3e20])[:, None]
    found = quantise_weight(weight, bits, group_size)
    assert (found.bits, found.group_size, found.columns) == (bits, group_size, columns)
    assert found.padded_columns == -(-columns // max(64, group_size)) * max(64, group_size)
    assert found.scales.shape == (5, found.padded_columns // group_size)
    assert found.scales.dtype == torch.bfloat16
    torch.testing.assert_close(
        dequantise(found, torch.float64), weight.double(), rtol=2**-8, atol=0
    )
    exact = dequantise(found, torch.float64)[:3]
    assert torch.equal(exact, weight[:3].double())


def test_a_word_of_four_bit_codes_holds_four_that_are_sixteen_apart() -> None:
    codes = torch.zeros(1, 128)
    codes[0, 64 + 16 * torch.arange(4) + 5] = torch.tensor([-8.0, 3.0, -1.0, 7.0])
    [words] = quantise_weight(codes, 4, 128).codes
    assert words.nonzero().flatten().tolist() == [16 + 5]
    assert words[21].item() & 0xFFFF == 0x7F38


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_error_of_eight_bits_is_bounded(group_size: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 256)
    found = quantise_weight(weight, 8, group_size)
    error = (dequantise(found, torch.float32) - weight).unflatten(1, (-1, group_size))
    # One step where the other end has no code, and 128 roundings of the scale to eight bits.
    assert (error.abs() <= 1.26 * found.scales.float().abs()[..., None]).all()


@pytest.mark.parametrize(
    ("bits", "group_size", "most"),
    [(8, 64, 0.0065), (4, 32, 0.084), (4, 64, 0.092), (4, 128, 0.099)],
)
def test_the_error_on_normal_numbers(bits: int, group_size: int, most: float) -> None:
    weight = torch.randn(500, 256, generator=torch.Generator().manual_seed(0))
    error = dequantise(quantise_weight(weight, bits, group_size), torch.float32) - weight
    assert 0.8 * most < error.norm() / weight.norm() < most


def test_four_bits_cut_off_the_largest_only_where_that_is_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))

    def errors() -> torch.Tensor:
        return (dequantise(quantise_weight(weight, 4, 64), torch.float32) - weight).norm(dim=1)

    chosen = errors()
    monkeypatch.setattr("mambakit.ops.quantisation._CLIPS", {4: ()})
    uncut = errors()
    assert (chosen <= uncut).all()
    assert (chosen < uncut).sum() > 100


def test_rows_do_not_depend_on_one_another_nor_on_the_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.randn(7, 100).bfloat16()
    whole = quantise_weight(weight, 4, 32)
    monkeypatch.setattr("mambakit.ops.quantisation._NUMBERS_AT_ONCE", 250)
    parts = quantise_weight(weight.double(), 4, 32)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


def test_zeros_stay_zeros() -> None:
    found = quantise_weight(torch.zeros(2, 70), 4, 64)
    assert torch.equal(dequantise(found, torch.float32), torch.zeros(2, 70))


def test_half_precision_is_rounded_once() -> None:
    found = QuantisedWeight(
        torch.full((1, 64), 101, dtype=torch.int8), torch.tensor([[1.0078125]]).bfloat16(), 64
    )
    expected = torch.tensor(101 * 1.0078125).half()
    assert torch.equal(dequantise(found, torch.float16), expected.expand(1, 64))


def test_wrong_arguments() -> None:
    weight = torch.randn(3, 8)
    with pytest.raises(ArgumentError, match=r"bits: got 5, wanted one of \(8, 4\)"):
        quantise_weight(weight, 5, 64)
    with pytest.raises(ArgumentError, match=r"group_size: got 48, wanted one of \(32, 64, 128\)"):
        quantise_weight(weight, 8, 48)
    with pytest.raises(ShapeError, match=r"weight: got shape \(8,\)"):
        quantise_weight(weight[0], 8, 64)
    with pytest.raises(DtypeError, match="weight: got dtype"):
        quantise_weight(weight.long(), 8, 64)
