"""What all tests share: a seed from the test's name, and GPU tests that skip or, if required, fail."""

from __future__ import annotations

import os
import re
import zlib

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """The same inputs for every backend."""
    name = re.sub(r"\b(cpu|cuda)\b", "", request.node.nodeid)
    torch.manual_seed(zlib.crc32(name.encode()))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if "gpu" in os.environ.get("MAMBAKIT_REQUIRE", "").split(","):
            pytest.fail("MAMBAKIT_REQUIRE=gpu, but torch sees no GPU")
        pytest.skip("needs a GPU")
