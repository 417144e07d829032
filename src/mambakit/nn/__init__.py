"""Modules: the Mamba mixer and those it is compared with, the block, the norm, and the state they pass along."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mambakit.lazy import attach

if TYPE_CHECKING:
    from mambakit.nn.block import Block as Block
    from mambakit.nn.h3 import H3Mixer as H3Mixer
    from mambakit.nn.mixer import MambaMixer as MambaMixer
    from mambakit.nn.norm import RMSNorm as RMSNorm
    from mambakit.nn.state import MixerState as MixerState
    from mambakit.nn.ungated import UngatedMixer as UngatedMixer

_EXPORTS = {
    "Block": "mambakit.nn.block",
    "H3Mixer": "mambakit.nn.h3",
    "MambaMixer": "mambakit.nn.mixer",
    "MixerState": "mambakit.nn.state",
    "RMSNorm": "mambakit.nn.norm",
    "UngatedMixer": "mambakit.nn.ungated",
}
__all__ = ["Block", "H3Mixer", "MambaMixer", "MixerState", "RMSNorm", "UngatedMixer"]

__getattr__, __dir__ = attach(__name__, _EXPORTS)
