"""Put `mixer.forward` into the Mamba layers of transformers, and take it out again.

transformers finds functions of `mamba_ssm` by name when a modelling file is imported, and falls back to its own without
a word. That would do for files that come later. But its own code around these functions forgets the state
when several tokens follow a cache, ignores padding in training, and reads the weight of `dt_proj` past adapters.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MIXERS = {
    "transformers.models.mamba.modeling_mamba": "MambaMixer",
    "transformers.models.falcon_mamba.modeling_falcon_mamba": "FalconMambaMixer",
    "transformers.models.jamba.modeling_jamba": "JambaMambaMixer",
}
"""The layers, by the module that holds them."""

_FUNCTION = "mamba_selective_scan"
"""In modules of the form that is known here. Those of older versions take functions by name alone."""

_originals: dict[Any, Callable[..., Any]] = {}


def start() -> None:
    """Patch the modules that are imported, and the others as they are."""
    if _hook not in sys.meta_path:
        sys.meta_path.insert(0, _hook)
    for name in MIXERS:
        if name in sys.modules:
            _patch(sys.modules[name])


def stop() -> None:
    """Give the layers their own forward again."""
    if _hook in sys.meta_path:
        sys.meta_path.remove(_hook)
    while _originals:
        mixer, forward = _originals.popitem()
        mixer.forward = forward


def _patch(module: ModuleType) -> None:
    mixer = getattr(module, MIXERS[module.__name__], None)
    if mixer is None or not hasattr(module, _FUNCTION) or mixer in _originals:
        return
    from transformers.integrations.accelerate import force_accelerate_hooks

    from mambakit.compat.transformers.mixer import forward

    _originals[mixer] = mixer.forward
    # Weights that are read and not called have to be where the input is.
    mixer.forward = force_accelerate_hooks(["conv1d", "dt_proj"])(forward)


class _Hook(MetaPathFinder):
    """Patches the modules of `MIXERS` once they are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MIXERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _patch(module)

        loader.exec_module = exec_module
        return spec


_hook = _Hook()
