"""Memory and time that loading a checkpoint takes, each in a process that does nothing else (Linux).

    python benchmarks/loading.py                # 2.8B in bfloat16, 5.5 GB on disk, 11 GB of memory
    python benchmarks/loading.py --size 130m

Peak: of the memory in use, files that are mapped included, beyond what is in use before. The time is
that of a file which the system may still have in memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mambakit.models import MambaConfig, MambaLanguageModel, load_model, preset, save_model
from report import environment, print_table, save

FORMATS = ("mambakit", "official", "huggingface")
DTYPES = ("bfloat16", "float32")


def memory(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(rf"{name}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def write(config: MambaConfig, folder: Path, format: str) -> None:
    """A checkpoint in bfloat16; what is in it does not matter."""
    with torch.device("meta"):
        model = MambaLanguageModel(config)
    model = model.bfloat16().to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    save_model(model, folder, format)


def read(folder: Path, dtype: str) -> dict[str, float]:
    """What loading takes in this process."""
    with tempfile.TemporaryDirectory() as small:  # Imports, and what first calls take.
        write(MambaConfig(d_model=64, n_layer=1), Path(small), "mambakit")
        load_model(small, dtype=torch.float32)
    before, start = memory("VmRSS"), time.perf_counter()
    model = load_model(folder, dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - start
    size = sum(parameter.nbytes for parameter in model.parameters())
    return {"seconds": seconds, "peak": memory("VmHWM") - before, "model": size}


def alone(*args: str) -> str:
    """What this script prints with these arguments, in a process of its own."""
    command = [sys.executable, __file__, *args]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="2.8b")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(preset(options.size), Path(options.write[0]), options.write[1])
        return
    if options.read:
        print(json.dumps(read(Path(options.read[0]), options.read[1])))
        return

    results, rows = {"environment": environment()}, []
    for format in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            alone("--size", options.size, "--write", folder, format)
            for dtype in DTYPES:
                found = json.loads(alone("--read", folder, dtype))
                results[f"{options.size}, {format}, to {dtype}"] = found
                peak, model = found["peak"], found["model"]
                gigabytes = (f"{size / 1e9:.2f}" for size in (model, peak))
                rows.append(
                    (format, dtype, *gigabytes, f"{peak / model:.2f}", f"{found['seconds']:.1f}")
                )
    header = ("bfloat16 in", "to", "model GB", "peak GB", "ratio", "seconds")
    print_table(f"loading {options.size}", header, rows)
    if options.json is not None:
        save(options.json, results)


if __name__ == "__main__":
    main()
