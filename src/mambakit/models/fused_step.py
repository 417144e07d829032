"""A decoding step of a plain model in one compiled call."""

from __future__ import annotations

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
from mambakit.nn.state import MixerState
from mambakit.ops.cpu.model_step import Head, Layer, model_step, suitable
from mambakit.ops.dispatch import unavailable

if TYPE_CHECKING:
    from mambakit.models.language_model import MambaLanguageModel


def fused_step(model: MambaLanguageModel, tokens: Tensor, state: ModelState) -> Tensor | None:
    """What `MambaLanguageModel.step` returns and does to the state, in one call of a kernel.

    None if the modules have to do it, because one of them is not the plain one (an adapter took its
    place, a hook looks on), or the kernel has no form for the config, dtype, device or layout.
    """
    config, backbone = model.config, model.backbone
    has_form = config.conv_bias and not config.bias and not config.is_complex
    if not has_form or len(config.selective) < 3 or torch.compiler.is_compiling():
        return None
    embedding, norm_f, head = backbone.embedding, backbone.norm_f, model.lm_head
    if torch.is_autocast_enabled("cpu"):
        return None
    blocks = list(backbone.blocks())
    modules = [*map(_modules, blocks)]
    plain = [embedding, norm_f, head, *chain.from_iterable(modules)]
    ends, kinds = _KINDS if model.quantisation is None else _QUANTISED_KINDS
    if not all(map(_is_plain, plain, (*ends, *kinds * len(blocks)))):
        return None
    if unavailable("cpu", norm_f.weight.device, norm_f.weight.dtype):
        return None
    layers = [*map(_layer, modules, state.layers)]
    last = Head(norm_f.weight, *_matrix(head))
    if not suitable(layers, last):
        return None
    eps = [*(block.norm.eps for block in blocks), norm_f.eps]
    embedded = embedding(tokens).detach().to(torch.float32, copy=True)
    return model_step(embedded, layers, last, eps, config.mixer_norm_epsilon)


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


def _is_plain(module: Any, kind: type[nn.Module]) -> bool:
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )


def _layer(modules: tuple[Any, ...], state: MixerState) -> Layer:
    """The tensors of a layer."""
    _, norm, mixer, in_proj, conv, x_proj, dt_proj, out_proj = modules
    return Layer(
        norm._parameters["weight"],
        *_matrix(in_proj),
        conv._parameters["weight"],
        conv._parameters["bias"],
        *_matrix(x_proj),
        *_matrix(dt_proj),
        dt_proj._parameters["bias"],
        mixer._parameters["A_log"],
        mixer._parameters["D"],
        *_matrix(out_proj),
        state.conv_state,
        state.ssm_state,
    )


def _matrix(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The weight of a layer, and its scales."""
    buffers = layer._buffers
    if buffers:
        return buffers["codes"], buffers["scales"]
    return layer._parameters["weight"], None
