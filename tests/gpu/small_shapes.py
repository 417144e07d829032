"""One op, forward and backward, or decoding, on small shapes, for compute-sanitizer: `small_shapes.py NAME`.

The scan runs as its sizes want it, in one piece and in three.
"""

from __future__ import annotations

import os
import sys

import torch
from examples import OPS, STEPS, call, on

from mambakit.models import MambaConfig, MambaLanguageModel
from mambakit.ops.cuda import causal_conv1d_linear, selective_scan
from mambakit.ops.cuda.arrays import has_warpgroups


def main(name: str) -> None:
    if name == "model_step":
        decode()
    elif name == "causal_conv1d_linear":
        convolve_and_multiply()
    else:
        run_op(name)
    torch.cuda.synchronize()
    # Not by way of the interpreter's end: under the tool a thread of PyTorch's is now and then still there, and aborts.
    os._exit(0)


def decode() -> None:
    """Steps of a whole model, with kernels of our own for the products and without, and with odd sizes."""
    odd = {"d_model": 17, "d_state": 5, "dt_rank": 3}
    for fields in ({"d_model": 72}, odd, {"d_model": 136, "dt_rank": 8}):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model = MambaLanguageModel(MambaConfig(n_layer=2, vocab_size=301, **fields))
            model = model.to("cuda", dtype)
            for batch in (1, 3, 8, 9, 33, 100):
                model.step(torch.arange(batch, device="cuda"), model.initial_state(batch))


def convolve_and_multiply() -> None:
    """In one kernel, as Hopper does with more rows."""
    if not has_warpgroups(torch.device("cuda", 0)):
        return
    for columns in (22, 160):
        x, state = torch.randn(2, 150, 192).bfloat16(), torch.randn(2, 192, 3).bfloat16()
        weight, bias, matrix = torch.randn(192, 4), torch.randn(192), torch.randn(columns, 192)
        x, state, matrix = x.cuda(), state.cuda(), matrix.bfloat16().cuda()
        causal_conv1d_linear.causal_conv1d_linear(
            x, weight.cuda(), bias.cuda(), "silu", state, matrix
        )


def run_op(name: str) -> None:
    op, draw = {**OPS, **STEPS}[name]
    inputs = draw()
    narrow = {
        key: tensor.bfloat16() if tensor.ndim >= 3 and tensor.is_floating_point() else tensor
        for key, tensor in inputs.items()
        if key not in ("initial_state", "ssm_state", "conv_state")
    }
    is_scan = name.startswith("selective_scan") and name in OPS
    for tensors in (inputs, narrow) if name in OPS else (inputs,):
        for chunks in (None, 1, 3) if is_scan else (None,):
            selective_scan.CHUNKS, selective_scan.IS_NARROW = chunks, chunks is None
            selective_scan.IS_FEW = chunks != 1
            call(op, on("cuda", tensors, has_gradient=name in OPS))


if __name__ == "__main__":
    main(sys.argv[1])
