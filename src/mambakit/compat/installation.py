"""Make `import mamba_ssm` and `import causal_conv1d` mean the modules in this folder."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType

from mambakit.compat import versions
from mambakit.compat.transformers import patching
from mambakit.errors import MambakitError

NAMES = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda")
"""Top-level modules that are provided."""

DISTRIBUTIONS = {"mamba-ssm": versions.MAMBA_SSM, "causal-conv1d": versions.CAUSAL_CONV1D}
"""What `importlib.metadata` then finds as installed, and its version."""


def install() -> None:
    """Let this process import `mamba_ssm`, `causal_conv1d` and `selective_scan_cuda` from mambakit.

    Call it before anything imports them. From then on it has precedence over packages of these
    names that are installed as well. The Mamba layers of transformers run on our operations too,
    whether transformers was imported before or is later. To call it twice does no harm.

    It holds for this process: one that is started by it, such as a worker of a data loader that is
    not forked, has to call it as well.

    Raises:
        MambakitError: A package of one of these names is already imported.

    Example:
        >>> import mambakit.compat
        >>> mambakit.compat.install()
        >>> from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        >>> selective_scan_fn.__module__
        'mambakit.compat.mamba_ssm.ops.selective_scan_interface'
        >>> mambakit.compat.uninstall()
    """
    for name in NAMES:
        module = sys.modules.get(name)
        if module is not None and not module.__name__.startswith(__package__):
            raise MambakitError(
                f"{name}: already imported from {module.__file__}, wanted nothing of this name; call "
                "mambakit.compat.install() before the first import of it"
            )
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    patching.start()


def uninstall() -> None:
    """Take back what `install` did; who has imported a name meanwhile keeps what they have."""
    patching.stop()
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in NAMES and module.__name__.startswith(__package__):
            del sys.modules[name]


def replace(name: str) -> None:
    """Put our module in the place of the one that calls this while it is imported, and `install`.

    For `packages/mamba-ssm-shim`, whose modules hold nothing else.

    Args:
        name: The calling module's `__name__`.
    """
    del sys.modules[name]
    install()
    importlib.import_module(name)  # The import that goes on takes what it finds under the name.


class _Finder(MetaPathFinder, Loader):
    """Finds `mamba_ssm.x` where `mambakit.compat.mamba_ssm.x` is: one module under two names.

    `from mamba_ssm import x` asks for the second name.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = fullname.removeprefix(f"{__package__}.")
        package = name.partition(".")[0]
        if package not in NAMES:
            return None
        if name == fullname:
            ours = importlib.util.find_spec(f"{__package__}.{name}")
        else:
            ours = PathFinder.find_spec(fullname, path)
        if ours is None:
            # Without its `name`: with it, `from mamba_ssm import Mamba2` would hide the message.
            raise ModuleNotFoundError(
                f"{name}: not in mambakit, which stands for {package} here and has what Mamba-1 "
                "needs, no Mamba-2 or Mamba-3; for those call mambakit.compat.uninstall() or remove "
                f"mamba-ssm-shim, and install the package {package.replace('_', '-')}"
            )
        if name != fullname:
            return ours
        is_package = ours.submodule_search_locations is not None
        return ModuleSpec(fullname, self, origin=ours.origin, is_package=is_package)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{__package__}.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has put the alias's in its place.
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterator[Distribution]:
        """What `importlib.metadata` asks for: programs look there whether a package is installed."""
        wanted = None if context is None else context.name
        for name, version in DISTRIBUTIONS.items():
            if wanted is None or re.sub(r"[-_.]+", "-", wanted).lower() == name:
                yield _Distribution(name, version)


class _Distribution(Distribution):
    def __init__(self, name: str, version: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: object) -> Path:
        return Path(__file__).parent / str(path)


_finder = _Finder()
