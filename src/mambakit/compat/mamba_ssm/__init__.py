"""The package `mamba_ssm` (state-spaces/mamba) on mambakit: its Mamba-1, under the same names.

Mamba-2, Mamba-3, attention and MLPs of that package are not here.
"""

from __future__ import annotations

from mambakit.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mambakit.compat.mamba_ssm.modules.mamba_simple import Mamba
from mambakit.compat.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from mambakit.compat.versions import MAMBA_SSM

__version__ = MAMBA_SSM

__all__ = [
    "Mamba",
    "MambaLMHeadModel",
    "mamba_inner_fn",
    "selective_scan_fn",
]
