import pytest
import torch

from mambakit.errors import ArgumentError, DtypeError, ShapeError
from mambakit.ops import causal_conv1d
from mambakit.ops.causal_conv1d_linear import causal_conv1d_linear, fuses

X, WEIGHT, MATRIX = torch.randn(2, 5, 8), torch.randn(8, 4), torch.randn(3, 8)


def test_is_a_convolution_and_a_product() -> None:
    y, state, product = causal_conv1d_linear(X, WEIGHT, MATRIX, activation="silu")
    expected_y, expected_state = causal_conv1d(X, WEIGHT, activation="silu")
    assert torch.equal(y, expected_y)
    assert torch.equal(state, expected_state)
    assert torch.equal(product, torch.nn.functional.linear(y, MATRIX))


def test_one_kernel_does_it_on_a_gpu_alone() -> None:
    with torch.no_grad():
        assert not fuses(X, WEIGHT, MATRIX)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"matrix": MATRIX[:, 1:]}, ShapeError, r"matrix: .*\(O, D\)"),
        ({"matrix": MATRIX[0]}, ShapeError, r"matrix: .*\(O, D\)"),
        ({"matrix": MATRIX.double()}, DtypeError, "matrix: got dtype torch.float64, wanted that of x"),
        ({"weight": WEIGHT[1:]}, ShapeError, "weight"),
        ({"activation": "gelu"}, ArgumentError, "activation"),
    ],
)  # fmt: skip
def test_what_does_not_fit(changed, error, message) -> None:
    with pytest.raises(error, match=message):
        causal_conv1d_linear(**{"x": X, "weight": WEIGHT, "matrix": MATRIX, **changed})
