"""Every public name of every package is there, and loads nothing before it is asked for."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

PACKAGES = [
    "mambakit",
    *(
        f"mambakit.{name}"
        for name in ("data", "evaluate", "generate", "models", "nn", "reproduce", "train")
    ),
]


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names(name: str) -> None:
    package = importlib.import_module(name)
    assert sorted(package.__all__) == sorted(package._EXPORTS)
    for exported in package.__all__:
        module = importlib.import_module(package._EXPORTS[exported])
        assert getattr(package, exported) is getattr(module, exported)
        assert exported in dir(package)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_packages_load_no_torch_and_no_numpy() -> None:
    code = f"import sys, {', '.join(PACKAGES)}; print({{'torch', 'numpy'}} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
