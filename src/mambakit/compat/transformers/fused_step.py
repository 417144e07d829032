"""A decoding step of transformers' MambaMixer on a CPU, in one compiled call.

Operation by operation it takes twice as long as reading the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambakit.nn.recomputation import is_plain
from mambakit.ops.cpu.model_step import mixer_step
from mambakit.ops.model_layer import Layer

_KINDS = {
    "in_proj": nn.Linear,
    "conv1d": nn.Conv1d,
    "x_proj": nn.Linear,
    "dt_proj": nn.Linear,
    "out_proj": nn.Linear,
}
"""The modules of a mixer without norms of dt, B and C, all of them plain."""


def fused_step(
    mixer: Any, hidden: Tensor, conv_state: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor] | None:
    """What the mixer makes of one position, (B, M), and the input of its convolution there, (B, D, 1).

    None if the operations have to do it: on a GPU, under `torch.compile` or autocast, where a module is not the plain
    one, or where the kernel has no form for it.

    Args:
        mixer: The module of transformers.
        hidden: (B, M).
        conv_state: Inputs of the convolution before, (B, D, at least W-1).
        ssm_state: (B, D, N). Updated in place.
    """
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    modules = {name: getattr(mixer, name) for name in _KINDS}
    are_plain = all(is_plain(modules[name], kind) for name, kind in _KINDS.items())
    if not are_plain or hasattr(mixer, "dt_layernorm") or torch.is_autocast_enabled("cpu"):
        return None
    in_proj, conv1d, x_proj, dt_proj, out_proj = modules.values()
    has_form = (
        in_proj.bias is None and out_proj.bias is None and conv1d.bias is not None
        and conv1d.kernel_size[0] > 1 and mixer.activation in ("silu", "swish")
    )  # fmt: skip
    if not has_form:
        return None
    # A copy: the cache takes the input by itself.
    past = conv_state[..., 1 - conv1d.kernel_size[0] :].to(conv1d.weight.dtype, copy=True)
    layer = Layer(
        norm=conv1d.bias[:0],
        in_proj=in_proj.weight,
        conv=conv1d.weight,
        conv_bias=conv1d.bias,
        x_proj=x_proj.weight,
        dt_proj=dt_proj.weight,
        dt_bias=dt_proj.bias.float(),
        A_log=mixer.A_log.float(),
        D=mixer.D.float(),
        out_proj=out_proj.weight,
        conv_state=past.contiguous(),
        ssm_state=ssm_state,
    )
    y = mixer_step(layer, hidden)
    return None if y is None else (y, layer.conv_state[..., -1:])
