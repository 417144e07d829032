"""`mamba_ssm.ops`."""

from __future__ import annotations

from mambakit.compat.mamba_ssm.ops import selective_scan_interface, triton

__all__ = ["selective_scan_interface", "triton"]
