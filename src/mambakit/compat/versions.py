"""The versions of other packages whose names are provided; without an import of those."""

from __future__ import annotations

MAMBA_SSM = "2.3.2+mambakit"
CAUSAL_CONV1D = "1.7.0+mambakit"
