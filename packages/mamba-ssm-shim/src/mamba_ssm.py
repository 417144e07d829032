"""`import mamba_ssm` means mambakit's module of this name; see `mambakit.compat`."""

from mambakit.compat.installation import replace

replace(__name__)
