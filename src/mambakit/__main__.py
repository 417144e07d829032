"""`python -m mambakit`, the same as the command `mambakit`."""

from __future__ import annotations

import sys

from mambakit.cli.main import main

# Worker processes of a spawn start import this module too; only the first may run the command.
if __name__ == "__main__":
    sys.exit(main())
