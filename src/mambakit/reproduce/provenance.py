"""Where a result comes from: commit, versions, device."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import mambakit


def provenance(device: torch.device) -> dict[str, str]:
    """Date, commit, device and versions, as a result file records them."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": _name(device),
        "mambakit": mambakit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _commit() -> str:
    """The commit of this package's source, or "unknown" where it is installed without its repository."""
    folder = Path(mambakit.__file__).parent
    git = shutil.which("git")
    if git is None:
        return "unknown"
    tracked = [git, "ls-files", "--error-unmatch", "__init__.py"]
    if subprocess.run(tracked, cwd=folder, capture_output=True, check=False).returncode:
        return (
            "unknown"  # The package may lie in an environment within another project's repository.
        )
    describe = [git, "describe", "--always", "--dirty"]
    done = subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
