"""The models of the experiments, and the few things that training and test ask of them."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.models.config import MambaConfig
from mambakit.models.language_model import MambaLanguageModel
from mambakit.reproduce.attention import AttentionConfig, AttentionModel
from mambakit.reproduce.recipe import Recipe

SequenceModel = MambaLanguageModel | AttentionModel


def build(config: MambaConfig | AttentionConfig, seed: int) -> SequenceModel:
    """Make a model with the initial weights of this seed, which are the same for every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, MambaConfig):
            return MambaLanguageModel(config)
        return AttentionModel(config)


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The precision of the recipe, for training and for tests alike."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")


def answer_logits(model: SequenceModel, tokens: Tensor, answers: int) -> Tensor:
    """Logits of the last `answers` positions, (B, answers, V); tokens (B, L). The head does not see the others."""
    if isinstance(model, MambaLanguageModel):
        hidden, _ = model.hidden(tokens)
    else:
        hidden = model.hidden(tokens)
    logits: Tensor = model.lm_head(hidden[:, -answers:])
    return logits


@torch.no_grad()
def answer_logits_in_chunks(
    model: SequenceModel, tokens: Tensor, answers: int, chunk: int
) -> Tensor:
    """What `answer_logits` gives, with the state of a Mamba model carried from chunk to chunk of positions.

    Attention keeps no state here: it sees the sequence whole, whatever that takes.
    """
    if not isinstance(model, MambaLanguageModel):
        return answer_logits(model, tokens, answers)
    state, last = None, None
    for first in range(0, tokens.shape[1], chunk):
        hidden, state = model.hidden(tokens[:, first : first + chunk], state)
        tail = hidden[:, -answers:]
        last = tail if last is None else torch.cat([last, tail], dim=1)[:, -answers:]
    assert last is not None
    logits: Tensor = model.lm_head(last)
    return logits
