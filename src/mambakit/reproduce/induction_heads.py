"""Induction heads: what followed this token before follows it again (section 4.1.2, Table 11)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from mambakit.models.config import MambaConfig
from mambakit.reproduce.attention import AttentionConfig, Positions
from mambakit.reproduce.draws import Draws
from mambakit.reproduce.experiment import Contestant, Examples, Experiment
from mambakit.reproduce.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class InductionHeads:
    """Random tokens with a special one among them and at the end; what followed the first follows the second.

    The special token is `vocab_size` - 1. The others are drawn independently; the place of the first special token is
    uniform in 0 ... L - 3, so that the token to recall is a random one.

    Args:
        vocab_size: Number of tokens, the special one included.

    Source: Gu & Dao 2023, section 4.1.2 and E.1; the data follows `generate_induction_head` of the H3 authors' code
    with one trigger.
    """

    vocab_size: int = 16

    @property
    def answers(self) -> int:
        """The token to recall."""
        return 1

    def make(self, draws: Draws, batch: int, seqlen: int) -> Examples:
        """Make sequences of `seqlen` tokens, at least 3."""
        special = self.vocab_size - 1
        tokens = draws.integers(special, batch, seqlen)
        place = draws.integers(seqlen - 2, batch, 1)
        tokens.scatter_(-1, place, special)
        tokens[..., -1] = special
        return Examples(tokens, tokens.gather(-1, place + 1))

    def kinds(self, tokens: Tensor) -> Mapping[str, Tensor]:
        """The special tokens, the one to recall, the one behind it, and the others."""
        special = tokens == self.vocab_size - 1
        recalled, behind = special.roll(1), special.roll(2) & ~special
        recalled[:1] = behind[:2] = (
            False  # What comes first follows nothing, least of all the last token.
        )
        other = ~(special | recalled | behind)
        return {"other": other, "special": special, "to recall": recalled, "behind it": behind}


EPOCH = 8192
"""Steps that the paper calls an epoch."""
_LENGTHS = tuple(2**power for power in range(6, 21))
_RECIPE = Recipe(
    seqlen=256,
    batch_size=8,
    lr=1e-3,
    steps=25 * EPOCH,
    steps_per_call=16,
    log_every=512,
    validate_every=EPOCH,
    validation_lengths=(256, 2**20),
    validation_sequences=256,
    target=100.0,
    hold=3,
    test_lengths=_LENGTHS,
    test_sequences=256,
)
_MAMBA = MambaConfig(d_model=64, n_layer=2, vocab_size=16, dt_rank=16, tie_embeddings=False)
"""The rank of dt is not the default, 4: it gives the paper's 74K parameters."""


def _attention(positions: Positions, title: str, epochs: int, paper: list[float]) -> Contestant:
    recipe = dataclasses.replace(
        _RECIPE,
        lr=2e-4,
        steps=epochs * EPOCH,
        validation_lengths=(256,),
        test_lengths=_LENGTHS[:9],  # To 2^14, the last of the paper's.
    )
    out_of_memory = [None] * (len(_LENGTHS) - len(paper))
    return Contestant(
        title=title,
        model=AttentionConfig(positions=positions),
        recipe=recipe,
        paper=dict(zip(_LENGTHS, [*paper, *out_of_memory], strict=True)),
    )


_QUICK = dataclasses.replace(
    _RECIPE,
    seqlen=32,
    batch_size=32,
    lr=3e-3,
    steps=600,
    steps_per_call=1,
    log_every=10,
    validate_every=100,
    validation_lengths=(32, 256),
    target=99.0,
    hold=1,
    test_lengths=(32, 64, 256, 1024),
)

EXPERIMENT = Experiment(
    name="induction-heads",
    title="Induction heads: trained at 256 tokens, tested to a million",
    source="Gu & Dao 2023, section 4.1.2, Table 11",
    task=InductionHeads(),
    contestants={
        "mamba": Contestant(
            title="Mamba", model=_MAMBA, recipe=_RECIPE, paper=dict.fromkeys(_LENGTHS, 100.0)
        ),
        "attention-absolute": _attention(
            "absolute", "attention, absolute", 25,
            [100.0, 99.6, 100.0, 58.6, 26.6, 18.8, 9.8, 10.9, 7.8],
        ),
        "attention-rope": _attention(
            "rope", "attention, RoPE", 50, [100.0, 100.0, 100.0, 83.6, 31.3, 18.4, 8.6, 9.0, 5.5]
        ),
        "attention-xpos": _attention(
            "xpos", "attention, xPos", 50, [100.0, 100.0, 100.0, 99.6, 67.6, 25.4, 7.0, 9.0, 7.8]
        ),
    },
    quick_task=InductionHeads(vocab_size=8),
    quick={
        name: Contestant(
            title=title, model=dataclasses.replace(_MAMBA, selective=selective), recipe=_QUICK
        )
        for name, title, selective in (
            ("mamba", "Mamba", _MAMBA.selective),
            ("mamba-s4d-real", "Mamba, selection off", ()),
        )
    },
)  # fmt: skip
