"""Whether the tensors of a checkpoint are those of the model that its config describes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from mambakit.errors import CheckpointError
from mambakit.models.formats.layout import CONFIG_FILE, Layout
from mambakit.models.language_model import MambaLanguageModel
from mambakit.models.weights import open_tensors

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")


def check_fit(folder: Path, files: list[Path], model: MambaLanguageModel, layout: Layout) -> None:
    """Compare names, shapes and dtypes; nothing is read but a tied head that is stored twice.

    Parameters may have any float dtype; codes and scales have their own.

    Raises:
        CheckpointError: They differ. The message names every tensor that is missing, unknown,
            or has another shape or dtype.
    """
    tensors = [item for file in files for item in open_tensors(file).items()]
    found = {layout.ours(name): (name, tensor) for name, tensor in tensors}
    twice = [name for name, tensor in tensors if found[layout.ours(name)][1] is not tensor]
    wanted, tied = model.state_dict(keep_vars=True), tied_head(model)
    missing = [layout.theirs(name) for name in wanted if name not in found and name not in tied]
    unknown = [theirs for name, (theirs, _) in found.items() if name not in wanted]
    complaints = [f"it lacks {joined(missing)}"] if missing else []
    complaints += [f"it has the unknown {joined(unknown)}"] if unknown else []
    complaints += [f"it has {joined(twice)} twice"] if twice else []
    complaints += _misshapen(found, wanted)
    # A head of a wrong shape is told as such.
    if not complaints:
        complaints = [
            f"the head is tied to the embedding, but {found[head][0]} is not {found[name][0]}"
            for head, name in tied.items()
            if head in found and not _equal(found[head], found[name])
        ]
    if complaints:
        raise CheckpointError(f"{folder} does not fit its {CONFIG_FILE}: {'; '.join(complaints)}")


def tied_head(model: MambaLanguageModel) -> dict[str, str]:
    """Names of the head's tensors that are those of the embedding, with their names there."""
    if not model.config.tie_embeddings:
        return {}
    names = [name for name in model.state_dict() if name.startswith("backbone.embedding.")]
    return {f"lm_head.{name.rpartition('.')[2]}": name for name in names}


def _misshapen(found: dict[str, tuple[str, Tensor]], wanted: dict[str, Tensor]) -> list[str]:
    """What is said of tensors with another shape or dtype, those of one kind together."""
    groups = defaultdict[str, list[str]](list)
    for ours, (name, tensor) in found.items():
        if ours not in wanted:
            continue
        want = wanted[ours]
        got, shape = tuple(tensor.shape), tuple(want.shape)
        if got != shape:
            groups[f"shape {got}, wanted {shape}"].append(name)
        is_parameter = isinstance(want, nn.Parameter)
        if tensor.dtype not in (_DTYPES if is_parameter else [want.dtype]):
            dtype = "a float of 16, 32 or 64 bits" if is_parameter else want.dtype
            groups[f"dtype {tensor.dtype}, wanted {dtype}"].append(name)
    return [f"{joined(names)}: got {what}" for what, names in groups.items()]


def _equal(one: tuple[str, Tensor], other: tuple[str, Tensor]) -> bool:
    return one[1].data_ptr() == other[1].data_ptr() or torch.equal(one[1], other[1])


def joined(names: Iterable[str]) -> str:
    """All the names in a line; of those that differ in the number of their layer, as one.

    Example:
        >>> joined(["norm", "layers.0.D", "layers.1.D", "layers.2.D", "layers.7.D"])
        'norm, layers.0-2,7.D'
    """
    layers = defaultdict[tuple[str, str], list[int]](list)
    for name in names:
        if match := _LAYER.fullmatch(name):
            layers[match[1], match[3]].append(int(match[2]))
        else:
            layers[name, ""] = []
    return ", ".join(
        before + _ranges(sorted(numbers)) + after for (before, after), numbers in layers.items()
    )


def _ranges(numbers: list[int]) -> str:
    """Numbers with a dash between the first and the last of each run."""
    runs = list[list[int]]()
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
