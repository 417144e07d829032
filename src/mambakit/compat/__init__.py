"""Code written for the authors' packages runs on this one: `mambakit.compat.install()`.

    installation.py       the names `mamba_ssm`, `causal_conv1d` and `selective_scan_cuda` as modules
    mamba_ssm/            the modules of that package, under the names they have there
    causal_conv1d/        the same of that one
    selective_scan_cuda.py
    transformers/         the Mamba layers of transformers on our operations

What stands here renames and transposes; the work is done by `mambakit.ops`, `mambakit.nn` and `mambakit.models`.
"""

from __future__ import annotations

from mambakit.compat.installation import install, uninstall

__all__ = ["install", "uninstall"]
