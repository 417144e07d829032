"""Adds the model type "mambakit" to lm_eval, as it adds its own: by name, imported when it is asked for.

lm_eval 0.4.13 takes types of models from a table in its own source. Python imports this module at its start (see
lm_eval_mambakit.pth), and it waits for that table: once `lm_eval.models` has been imported, the registry has one more
name. Where nobody imports lm_eval, nothing else is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

TABLE, TYPE = "lm_eval.models", "mambakit"


class Loader(SourceFileLoader):
    """Loads the module with the table, and adds the name to what it has filled."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module."""
        super().exec_module(module)
        from lm_eval.api.registry import model_registry

        if TYPE not in model_registry:
            model_registry.register(TYPE, target="mambakit.lm_eval:CheckpointModel")


class Finder:
    """Finds that one module as Python does, for another loader."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        """Answer for that module alone."""
        spec = PathFinder.find_spec(name, path) if name == TABLE else None
        if spec is not None and spec.origin is not None:
            spec.loader = Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, Finder)
