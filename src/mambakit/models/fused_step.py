"""A decoding step of a plain model by the kernels that do a whole step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mambakit.models.state import ModelState
from mambakit.nn.block import Block
from mambakit.nn.conv import CausalConv1d
from mambakit.nn.linear import DtProjection, Linear
from mambakit.nn.mixer import MambaMixer
from mambakit.nn.norm import RMSNorm
from mambakit.nn.quantised_linear import QuantisedDtProjection, QuantisedEmbedding, QuantisedLinear
from mambakit.nn.recomputation import is_plain
from mambakit.nn.state import MixerState
from mambakit.ops import cuda
from mambakit.ops.cpu import model_step as on_cpu
from mambakit.ops.deferred_states import DeferredStates
from mambakit.ops.dispatch import unavailable
from mambakit.ops.model_layer import Layer

if TYPE_CHECKING:
    from mambakit.models.language_model import MambaLanguageModel
    from mambakit.ops.cuda.model_step import ModelStep


def fused_step(
    model: MambaLanguageModel,
    device: torch.device,
    state: ModelState,
    deferred: DeferredStates | None = None,
) -> Callable[[Tensor], Tensor] | None:
    """What does `MambaLanguageModel.step` with this state to tokens on a device, without the modules.

    On the CPU that is one call of a kernel, on a GPU four kernels a layer. None if the modules
    have to do it, because one of them is not the plain one (an adapter took its place, a hook
    looks on), or the kernels have no form for the config, dtype, device or layout.

    What it gives works on the tensors that the model and the state hold now; deferred as for `prepared_step`.
    """
    config, backbone = model.config, model.backbone
    has_form = config.conv_bias and not config.bias and not config.is_complex
    if not has_form or len(config.selective) < 3 or torch.compiler.is_compiling():
        return None
    embedding, norm_f, head = backbone.embedding, backbone.norm_f, model.lm_head
    blocks = list(backbone.blocks())
    modules = [*map(_modules, blocks)]
    plain = [embedding, norm_f, head, *chain.from_iterable(modules)]
    ends, kinds = _KINDS if model.quantisation is None else _QUANTISED_KINDS
    if not all(map(is_plain, plain, (*ends, *kinds * len(blocks)))):
        return None
    dtype = norm_f.weight.dtype
    if device != norm_f.weight.device or device.type not in ("cpu", "cuda"):
        return None
    if torch.is_autocast_enabled(device.type) or unavailable(device.type, device, dtype):
        return None
    layers = [*map(_layer, modules, state.layers)]
    eps = [*(block.norm.eps for block in blocks), norm_f.eps]
    if device.type == "cuda":
        is_narrow = not config.residual_in_fp32 and dtype != torch.float32
        if is_narrow or config.mixer_norm_epsilon is not None or model.quantisation is not None:
            return None
        around = embedding.weight, norm_f.weight, _matrix(head)[0]
        if not cuda.model_step.suitable(layers, around):
            return None
        step: Callable[[Tensor], Tensor] = cuda.model_step.ModelStep(layers, around, eps, deferred)
        return step
    last = on_cpu.Head(norm_f.weight, *_matrix(head))
    if not on_cpu.suitable(layers, last):
        return None
    whole = on_cpu.ModelStep(layers, last, eps, config.mixer_norm_epsilon)
    return lambda tokens: whole(embedding(tokens).detach().float())


def gives_same_bits(model: MambaLanguageModel, state: ModelState, batch: int, other: int) -> bool:
    """Whether a step of so many rows of this state gives each the same bits as one of so many others."""
    if batch == other or state.layers[0].ssm_state.device.type == "cpu":
        return True
    fused = _on_gpu(model, state)
    return fused is not None and fused.gives_same_bits(batch, other)


def can_defer(model: MambaLanguageModel, state: ModelState) -> bool:
    """Whether a step can defer these states."""
    fused = _on_gpu(model, state)
    return fused is not None and fused.can_defer(state.batch_size)


def should_defer(model: MambaLanguageModel, state: ModelState) -> bool:
    """Whether a step is faster if it does."""
    fused = _on_gpu(model, state)
    return fused is not None and fused.should_defer(state.batch_size)


def settler(
    model: MambaLanguageModel, state: ModelState, deferred: DeferredStates
) -> Callable[[], None]:
    """What writes these states, which were deferred."""
    fused = fused_step(model, state.layers[0].ssm_state.device, state, deferred)
    assert isinstance(fused, cuda.model_step.ModelStep)
    return fused.settle


def _on_gpu(model: MambaLanguageModel, state: ModelState) -> ModelStep | None:
    device = state.layers[0].ssm_state.device
    fused = fused_step(model, device, state) if device.type == "cuda" else None
    return fused if isinstance(fused, cuda.model_step.ModelStep) else None


_KINDS = (
    (nn.Embedding, RMSNorm, Linear),
    (Block, RMSNorm, MambaMixer, Linear, CausalConv1d, Linear, DtProjection, Linear),
)
_QUANTISED_KINDS = (
    (QuantisedEmbedding, RMSNorm, QuantisedLinear),
    (
        Block, RMSNorm, MambaMixer, QuantisedLinear, CausalConv1d, QuantisedLinear,
        QuantisedDtProjection, QuantisedLinear,
    ),
)  # fmt: skip
"""Of embedding, last norm and head; and of a layer, in the order of `_modules`."""


def _modules(block: Any) -> tuple[Any, ...]:
    """A layer's modules, in the order of `_KINDS[1]`.

    Looks into the dicts of the modules, since 400 calls of their `__getattr__` would take 5 % of a
    step.
    """
    norm, mixer = block._modules["norm"], block._modules["mixer"]
    names = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    return (block, norm, mixer, *[mixer._modules[name] for name in names])


def _layer(modules: tuple[Any, ...], state: MixerState) -> Layer:
    """The tensors of a layer."""
    _, norm, mixer, in_proj, conv, x_proj, dt_proj, out_proj = modules
    (w_in, s_in), (w_x, s_x), (w_dt, s_dt), (w_out, s_out) = map(
        _matrix, (in_proj, x_proj, dt_proj, out_proj)
    )
    return Layer(
        norm=norm._parameters["weight"],
        in_proj=w_in,
        conv=conv._parameters["weight"],
        conv_bias=conv._parameters["bias"],
        x_proj=w_x,
        dt_proj=w_dt,
        dt_bias=dt_proj._parameters["bias"],
        A_log=mixer._parameters["A_log"],
        D=mixer._parameters["D"],
        out_proj=w_out,
        conv_state=state.conv_state,
        ssm_state=state.ssm_state,
        in_scales=s_in,
        x_scales=s_x,
        dt_scales=s_dt,
        out_scales=s_out,
    )


def _matrix(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The weight of a layer, and its scales."""
    buffers = layer._buffers
    if buffers:
        return buffers["codes"], buffers["scales"]
    return layer._parameters["weight"], None
