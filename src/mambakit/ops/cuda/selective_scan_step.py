"""One step of the selective scan on a GPU: a PyTorch operator around `kernels/selective_scan_step.cu`."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from mambakit.ops.cuda.arrays import TYPES, Variants, lanes, parameter, readable
from mambakit.ops.cuda.compiler import kernel
from mambakit.ops.operators import Operator

THREADS = 128
"""Of a block; see the kernel."""


def selective_scan_step(
    ssm_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """Arguments as in `mambakit.ops.selective_scan_step`."""
    y: Tensor = _step(ssm_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return y


def _run_step(
    ssm_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    dt_bias: Optional[Tensor],
    dt_softplus: bool,
) -> Tensor:
    batch, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    in_place = ssm_state.stride(-1) == 1 and not ssm_state.is_conj()
    state = (
        ssm_state
        if in_place
        else ssm_state.resolve_conj().clone(memory_format=torch.contiguous_format)
    )
    is_complex = A.is_complex()
    if is_complex:
        A, B, C = (weight.to(torch.complex64).resolve_conj() for weight in (A, B, C))
    h, a = _floats(state), _floats(A).float().contiguous()
    b, c = (_groups(_floats(weight), batch) for weight in (B, C))
    dt, z = _known(dt), None if z is None else _known(z)
    if D is not None and dt_bias is not None and D.dtype != dt_bias.dtype:
        D, dt_bias = D.float(), dt_bias.float()
    D, dt_bias = parameter(D), parameter(dt_bias)
    parameters = next((t.dtype for t in (D, dt_bias) if t is not None), torch.float32)

    along = lanes(4, h.shape[2], h, a, b, c)
    constants = _constants(is_complex, h.shape[2], along)
    launch = kernel(
        "selective_scan_step.cu", "selective_scan_step", x.device, X=TYPES[x.dtype], DT=TYPES[dt.dtype],
        Z=TYPES[x.dtype if z is None else z.dtype], B_TYPE=TYPES[b.dtype], C_TYPE=TYPES[c.dtype],
        PARAMETER=TYPES[parameters], **constants,
    )  # fmt: skip
    per_block = THREADS // int(constants["SPREAD"])
    launch(
        (-(-channels // per_block), min(batch, 65535)), THREADS, h, *h.stride()[:2], x, *x.stride(), dt, *dt.stride(),
        a, b, *b.stride()[:2], channels // b.shape[1], c, *c.stride()[:2], channels // c.shape[1], D,
        z, *((0, 0) if z is None else z.stride()), dt_bias, dt_softplus, y, batch, channels, A.shape[1],
    )  # fmt: skip
    if not in_place:
        ssm_state.copy_(state)
    return y


def _fake_step(ssm_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    return x.new_empty(x.shape)


_step = Operator(
    "cuda_selective_scan_step", "cuda", _run_step, fake=_fake_step, mutates=["ssm_state"]
)


def _known(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in TYPES else tensor.float()


def _floats(tensor: Tensor) -> Tensor:
    """(..., N) as it is, or of complex numbers their parts, (..., 2 N); the last dimension contiguous."""
    tensor = readable(tensor)
    return torch.view_as_real(tensor).flatten(-2) if tensor.is_complex() else tensor


def _groups(weight: Tensor, batch: int) -> Tensor:
    """B or C as (B, G, N): what is constant in time has a group for every channel."""
    if weight.ndim == 2:
        weight = weight[:, None]
    return _known(weight).expand(batch, -1, -1)


def _constants(is_complex: bool, numbers: int, along: int) -> dict[str, int | str]:
    """How the numbers of a channel's state are spread over lanes that move `along` at a time."""
    spread = 1
    while spread < 32 and spread * along < numbers:
        spread *= 2
    return {"COMPLEX": int(is_complex), "LANES": along, "SPREAD": spread}


def variants() -> Variants:
    """The kernels of the usual dtypes and state sizes, real and complex."""
    found: Variants = []
    for io, is_complex, numbers, along in (
        ("bfloat16", False, 16, 4),
        ("float", False, 5, 1),
        ("float16", True, 32, 4),
    ):
        weights = "float" if is_complex else io
        types = {"X": io, "DT": io, "Z": io, "B_TYPE": weights, "C_TYPE": weights}
        constants = {**types, "PARAMETER": "float", **_constants(is_complex, numbers, along)}
        found.append(("selective_scan_step.cu", "selective_scan_step", constants))
    return found
