from __future__ import annotations

import pytest
import torch

from mambakit.nn import linear as module
from mambakit.nn.linear import Linear


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_prompts_are_multiplied_in_float32_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, is_slow: bool, bias: bool
) -> None:
    monkeypatch.setattr(module, "slow_bfloat16", lambda: "no instructions" if is_slow else None)
    dtypes = []
    product = torch.nn.functional.linear

    def watched(x: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        dtypes.append(x.dtype)
        return product(x, *others)

    monkeypatch.setattr(module, "linear", watched)
    torch.manual_seed(0)
    layer = Linear(40, 7, bias=bias).bfloat16()
    x = torch.randn(2, 3, 40).bfloat16()
    with torch.no_grad():
        y = layer(x)
        exact = product(x.double(), *(p.double() for p in layer.parameters()))
    assert y.dtype == torch.bfloat16
    assert dtypes == [torch.float32 if is_slow else torch.bfloat16]
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=1e-3)
    layer(x).float().sum().backward()
    assert dtypes[1:] == [torch.bfloat16]
