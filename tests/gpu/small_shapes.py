"""Forward and backward of one op on small shapes, to be run under compute-sanitizer: `small_shapes.py NAME`.

The scan runs in one piece and in three.
"""

from __future__ import annotations

import sys

import torch
from examples import OPS, STEPS, call, on


def main(name: str) -> None:
    op, draw = {**OPS, **STEPS}[name]
    inputs = draw()
    narrow = {
        key: tensor.bfloat16() if tensor.ndim >= 3 and tensor.is_floating_point() else tensor
        for key, tensor in inputs.items()
        if key not in ("initial_state", "ssm_state", "conv_state")
    }
    for tensors in (inputs, narrow) if name in OPS else (inputs,):
        for chunks in (1, 3) if name.startswith("selective_scan") and name in OPS else (None,):
            if chunks is not None:
                from mambakit.ops.cuda import selective_scan

                selective_scan.CHUNKS = chunks
            call(op, on("cuda", tensors, has_gradient=name in OPS))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
