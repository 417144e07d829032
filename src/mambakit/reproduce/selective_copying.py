"""Selective copying: remember the data tokens, ignore the noise between them (section 4.1.1, Table 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from mambakit.models.config import MambaConfig
from mambakit.reproduce.draws import Draws
from mambakit.reproduce.experiment import Contestant, Examples, Experiment
from mambakit.reproduce.recipe import Recipe

NOISE = 0


@dataclasses.dataclass(frozen=True)
class SelectiveCopying:
    """Data tokens at random places in noise, then markers at which they are to be said in their order.

    Token 0 is noise, `vocab_size` - 1 the marker, the others are data. The M data tokens are drawn independently; their
    places are a uniform subset of the first seqlen + M positions. M markers follow: L = seqlen + 2 M.

    Args:
        vocab_size: Number of tokens.
        memorize: Number of data tokens (M).

    Source: Gu & Dao 2023, section 4.1.1 and E.1, whose data follows `torch_copying_data(variable=True)` of the S4 code.
    """

    vocab_size: int = 16
    memorize: int = 16

    @property
    def answers(self) -> int:
        """The data tokens."""
        return self.memorize

    def make(self, draws: Draws, batch: int, seqlen: int) -> Examples:
        """Make sequences with `seqlen` positions of noise."""
        count, marker = self.memorize, self.vocab_size - 1
        data = 1 + draws.integers(self.vocab_size - 2, batch, count)
        # The places of the largest of independent numbers are a uniform subset.
        places = draws.bits(batch, seqlen + count).topk(count, sorted=False).indices.sort().values
        tokens = data.new_full((*data.shape[:2], seqlen + 2 * count), NOISE)
        tokens.scatter_(-1, places, data)
        tokens[..., seqlen + count :] = marker
        return Examples(tokens, data)

    def kinds(self, tokens: Tensor) -> Mapping[str, Tensor]:
        """Noise, data and markers."""
        noise, marker = tokens == NOISE, tokens == self.vocab_size - 1
        return {"noise": noise, "data": ~(noise | marker), "marker": marker}


_RECIPE = Recipe(
    seqlen=4096,
    batch_size=64,
    lr=1e-4,
    steps=400_000,
    precision="bfloat16",
    steps_per_call=4,
    log_every=40,
    validate_every=2000,
    validation_lengths=(4096,),
    validation_sequences=256,
    target=99.8,
    hold=5,
    test_lengths=(4096,),
    test_sequences=1024,
)
_LAYERS: dict[str, tuple[str, dict[str, object]]] = {
    "s6": ("S6", {}),
    "s4d-real": ("S4D, real", {"selective": ()}),
    "s4d-complex": ("S4D, complex", {"selective": (), "A_init": "s4d-lin"}),
}
"""The scan: selective, or constant in time."""
_BLOCKS = {"mamba": "Mamba", "h3": "H3", "ungated": "no gate"}
_PAPER = {
    ("ungated", "s4d-complex"): 18.3,
    ("ungated", "s6"): 97.0,
    ("h3", "s4d-complex"): 57.0,
    ("h3", "s6"): 99.7,
    ("mamba", "s4d-complex"): 56.4,
    ("mamba", "s6"): 99.8,
}
"""Table 1. Its "S4" does not say whether real or complex; it stands beside the complex rows, S4's own form."""


def _contestant(block: str, layer: str, recipe: Recipe, paper: float | None) -> Contestant:
    title, switches = _LAYERS[layer]
    return Contestant(
        title=f"{_BLOCKS[block]}, {title}",
        model=MambaConfig.from_dict(
            {
                **{"d_model": 64, "n_layer": 2, "vocab_size": 16, "tie_embeddings": False},
                **{"block": block, **switches},
            }
        ),
        recipe=recipe,
        paper={} if paper is None else {recipe.seqlen: paper},
    )


_QUICK = dataclasses.replace(
    _RECIPE,
    seqlen=64,
    batch_size=16,
    lr=2e-3,
    steps=800,
    precision="float32",
    steps_per_call=1,
    log_every=10,
    validate_every=100,
    validation_lengths=(64,),
    target=99.0,
    hold=1,
    test_lengths=(64,),
    test_sequences=256,
)

EXPERIMENT = Experiment(
    name="selective-copying",
    title="Selective copying: which layers can choose what they remember",
    source="Gu & Dao 2023, section 4.1.1, Table 1",
    task=SelectiveCopying(),
    contestants={
        f"{block}-{layer}": _contestant(block, layer, _RECIPE, _PAPER.get((block, layer)))
        for block in _BLOCKS
        for layer in _LAYERS
    },
    quick_task=SelectiveCopying(vocab_size=8, memorize=4),
    quick={
        f"mamba-{layer}": _contestant("mamba", layer, _QUICK, None) for layer in ("s6", "s4d-real")
    },
)
