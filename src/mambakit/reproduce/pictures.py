"""Pictures of an experiment: accuracy of its models, and the time steps that a trained model takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mambakit.files import atomic_write
from mambakit.models.language_model import MambaLanguageModel
from mambakit.reproduce.draws import Draws
from mambakit.reproduce.evaluation import TEST
from mambakit.reproduce.experiment import Experiment, Task
from mambakit.reproduce.models import SequenceModel
from mambakit.reproduce.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACY = "accuracy.png"
STEPS = "dt.png"
SHOWN = 192
"""Longest sequence that a picture of dt shows, so that single positions can be seen."""
FLOOR = -8
"""log10 of the dt below which all is one colour: a hundred million steps of it would still change next to nothing."""
_KIND_COLOURS = ("tab:gray", "tab:blue", "tab:orange", "tab:red")


def has_steps(model: SequenceModel) -> bool:
    """Whether the model's dt depends on what it reads."""
    return isinstance(model, MambaLanguageModel) and "dt" in model.config.selective


@torch.no_grad()
def time_steps(model: MambaLanguageModel, tokens: Tensor) -> list[Tensor]:
    """dt of each layer at each position of one sequence, after bias and softplus: tokens (L,) to tensors (L, D)."""
    found: list[Tensor] = []
    hooks = [
        block.mixer.dt_proj.register_forward_hook(
            lambda layer, _, out: found.append(softplus(out[0].float() + layer.bias))
        )
        for block in model.backbone.blocks()
    ]
    try:
        model.hidden(tokens[None])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def draw_steps(model: SequenceModel, task: Task, recipe: Recipe, path: Path) -> None:
    """Draw dt over a test sequence: which tokens are let in, and which are passed over.

    For each layer the channels over the positions, sorted by how much larger dt is at the tokens that matter than at
    the rest; below, the geometric mean over the upper quarter of them, coloured by the kind of token. The sequence is
    as long as those of the training, or `SHOWN` where that is shorter.
    """
    assert isinstance(model, MambaLanguageModel)
    device = next(model.parameters()).device
    draws = Draws(recipe.seed, TEST, torch.zeros(1, dtype=torch.int64, device=device))
    tokens = task.make(draws, 1, min(recipe.seqlen, SHOWN)).tokens[0, 0]
    kinds = {name: mask.cpu() for name, mask in task.kinds(tokens).items()}
    layers = [dt.cpu() for dt in time_steps(model, tokens)]
    figure = _figure(10, 3.4 * len(layers))
    axes = figure.subplots(2 * len(layers), 1, sharex=True, height_ratios=[2, 1] * len(layers))
    for number, dt in enumerate(layers):
        above, below = axes[2 * number : 2 * number + 2]
        dt = dt[:, most_selective(dt, kinds)]
        image = above.imshow(
            dt.log10().T.numpy(),
            aspect="auto",
            interpolation="nearest",
            vmin=max(FLOOR, float(dt.min().log10())),
        )
        figure.colorbar(image, ax=[above, below], label="log10 dt", fraction=0.03, pad=0.01)
        above.set_ylabel("channel, sorted")
        above.set_title(f"layer {number + 1}")
        _draw_means(below, dt[:, : dt.shape[1] // 4].log().mean(-1).exp(), kinds)
    figure.legend(
        *axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds)
    )
    axes[-1].set_xlabel("position")
    _save(figure, path)


def most_selective(dt: Tensor, kinds: Mapping[str, Tensor]) -> Tensor:
    """Channels of dt, (L, D), by how much larger it is where it matters than at the first kind of token; most first."""
    rest, *others = kinds.values()
    matters = torch.stack(others).any(0)
    return (dt[matters].log().mean(0) - dt[rest].log().mean(0)).argsort(descending=True)


def _draw_means(axes: Axes, means: Tensor, kinds: Mapping[str, Tensor]) -> None:
    for (name, mask), colour in zip(kinds.items(), _KIND_COLOURS, strict=False):
        places = mask.nonzero().flatten()
        axes.plot(
            places.numpy(), means[places].numpy(), "o", color=colour, markersize=3, label=name
        )
    axes.set_ylabel("mean dt, upper\nquarter")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def draw_accuracy(
    experiment: Experiment, results: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """Draw accuracy over the steps of training and, where there are several test lengths, over those."""
    tested = {name: _accuracies(result) for name, result in results.items()}
    several = max(map(len, tested.values()), default=0) > 1
    figure = _figure(12 if several else 7, 4.5)
    axes = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    for number, (name, result) in enumerate(results.items()):
        title, colour = experiment.contestants[name].title, f"C{number}"
        course = [(r["step"], r["accuracy_percent"]) for r in result["history"]]
        if course:
            axes[0].plot(*zip(*course, strict=True), color=colour, label=title)
        if several and tested[name]:
            axes[1].plot(*zip(*tested[name], strict=True), "o-", color=colour, label=title)
            paper = experiment.contestants[name].paper.items()
            if known := [(n, accuracy) for n, accuracy in paper if accuracy is not None]:
                axes[1].plot(*zip(*known, strict=True), ":", color=colour)
    axes[0].set_xlabel("optimizer step")
    axes[0].set_ylabel("validation accuracy (%)")
    if several:
        axes[1].set_xscale("log", base=2)
        axes[1].set_xlabel("length of the test sequences (dotted: the paper)")
        axes[1].set_ylabel("test accuracy (%)")
    for axis in axes:
        axis.set_ylim(0, 103)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    _save(figure, path)


def _accuracies(result: Mapping[str, Any]) -> list[tuple[int, float]]:
    scores = result["test"].items()
    return [
        (int(n), score["accuracy_percent"])
        for n, score in scores
        if score["is_whole"] and not score["error"]
    ]


def _figure(width: float, height: float) -> Figure:
    # Not at the top: it takes a second that a run can do without until here.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as partial:
        figure.savefig(partial)
