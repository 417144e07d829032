import sys
from pathlib import Path

import pytest

# accuracy.py and scan_inputs.py, beside this file, are shared by all parity tests.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> str:
    """Every fast backend."""
    return request.param
