"""What pyproject.toml cannot say: a .pth file lies beside the module, so that Python imports it at its start."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

START = "lm_eval_mambakit.pth"


class BuildWithStart(build_py):
    """Puts the file where the module goes."""

    def run(self) -> None:
        """Copy what there is to copy."""
        super().run()
        self.copy_file(str(Path("src", START)), str(Path(self.build_lib, START)))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Name what was copied."""
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, START))]


setup(cmdclass={"build_py": BuildWithStart})
