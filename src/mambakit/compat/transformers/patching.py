"""Put `mixer.forward` into the Mamba layers of transformers, and take it out again.

transformers finds functions of `mamba_ssm` by name when a modelling file is imported, and falls back to its own without
a word. That would do for files that come later. But its own code around these functions forgets the state
when several tokens follow a cache, ignores padding in training, and reads the weight of `dt_proj` past adapters.

peft refuses adapters of `out_proj` in these models, since the authors' package would read its weight past them. Our
forward calls the layer, so peft may.
"""

from __future__ import annotations

import functools
import importlib.machinery
import sys
import warnings
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

_FUNCTION, _METHOD = "mamba_selective_scan", "get_conv_state"
"""Of modelling files and of the cache, in the form that is known here: that of 5.21 and later."""

_GUARD = "_check_lora_target_modules_mamba"
"""peft's function that refuses."""

_KINDS = ("mamba", "falcon_mamba")
"""Of the models that peft's guard knows, those whose layers are ours."""

_patched: set[str] = set()
"""Names of modules."""

_originals: list[tuple[Any, str, Any]] = []
"""What was replaced in them: where, by which name, and what was there."""


def start() -> None:
    """Patch the modules that are imported, and the others as they are."""
    if _hook not in sys.meta_path:
        sys.meta_path.insert(0, _hook)
    for name in _PATCHES:
        if name in sys.modules:
            _patch(sys.modules[name])


def stop() -> None:
    """Give everything back."""
    if _hook in sys.meta_path:
        sys.meta_path.remove(_hook)
    while _originals:
        setattr(*_originals.pop())
    _patched.clear()


def _patch(module: ModuleType) -> None:
    if module.__name__ not in _patched:
        _patched.add(module.__name__)
        _PATCHES[module.__name__](module)


def _replace(owner: Any, name: str, value: Any) -> None:
    _originals.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _patch_mixer(module: ModuleType) -> None:
    import transformers
    from transformers.cache_utils import Cache

    mixer = getattr(module, MIXERS[module.__name__], None)
    if mixer is None or not hasattr(module, _FUNCTION) or not hasattr(Cache, _METHOD):
        warnings.warn(
            f"{module.__name__} of transformers {transformers.__version__} keeps its own layer, which finds functions "
            "of mambakit by name alone; upgrade transformers to 5.21 or later",
            stacklevel=2,
        )
        return
    import torch
    from transformers.integrations.accelerate import force_accelerate_hooks

    from mambakit.compat.transformers.mixer import forward

    theirs = mixer.forward

    @functools.wraps(forward)
    def ours_or_exported(self: Any, *args: Any, **kwargs: Any) -> Any:
        # What is exported runs elsewhere: in ONNX, or where there is no mambakit.
        return (theirs if torch.compiler.is_exporting() else forward)(self, *args, **kwargs)

    # Weights that are read and not called have to be where the input is.
    _replace(mixer, "forward", force_accelerate_hooks(["conv1d", "dt_proj"])(ours_or_exported))


def _patch_tuner(module: ModuleType) -> None:
    theirs = getattr(module, _GUARD, None)
    if theirs is None:
        return

    @functools.wraps(theirs)
    def guard(peft_config: Any, model: Any, target_name: str) -> None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if not (target_name == "out_proj" and kind in _KINDS):
            theirs(peft_config, model, target_name)

    _replace(module, _GUARD, guard)


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    **dict.fromkeys(MIXERS, _patch_mixer),
    "peft.tuners.tuners_utils": _patch_tuner,
}
"""How to patch each module."""


class _Hook(MetaPathFinder):
    """Patches the modules of `_PATCHES` once they are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _PATCHES:
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
