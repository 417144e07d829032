"""Files of weights: safetensors or PyTorch's pickles, whole or in shards; mapped into memory.

Nothing is read before it is asked for, no code is run, and no file outside the folder is opened.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambakit.errors import CheckpointError
from mambakit.files import atomic_write
from mambakit.models.formats.layout import PICKLE, SAFETENSORS

MAPPED_BYTES = 2**28
"""As much of a file is read before it is mapped anew, so that what was copied counts no longer."""
_REMEDY = "copy or save it again"


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights, safetensors before pickles, whole before shards.

    Raises:
        CheckpointError: There are none, or an index names files that are not there.
    """
    for name in (SAFETENSORS, PICKLE):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return _shards(index)
    raise CheckpointError(
        f"{folder / SAFETENSORS} is missing, and so is {PICKLE}; the checkpoint is not complete"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of weights ({error}); {_REMEDY}") from error
    for name in names:
        if not isinstance(name, str) or _is_path(name):
            raise CheckpointError(
                f"{index} names {name!r}, which is not a file in its folder; do not trust this checkpoint"
            )
    files = [index.parent / name for name in sorted(names)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{index} names {', '.join(missing)}, missing in its folder; copy all of the checkpoint"
        )
    return files


def _is_path(name: str) -> bool:
    """Whether a name is more than that of a file in a folder, on any system."""
    return name in ("", ".", "..") or any(
        kind(name).name != name for kind in (PurePosixPath, PureWindowsPath)
    )


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped: each is read from disk when it is looked at.

    Pickles of the time before PyTorch 1.6 cannot be mapped and are read at once.

    Raises:
        CheckpointError: The file is damaged, or a pickle that holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged or cut off ({error}); {_REMEDY}") from error
    return _open_pickle(path)


def _open_pickle(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} is refused: besides tensors it holds {found[1]}, which could run code; "
                f"ask its author for {SAFETENSORS}"
            ) from error
        raise CheckpointError(f"{path} is damaged or cut off; {_REMEDY}") from error
    except Exception as error:  # A damaged file fails in many ways inside torch and zipfile.
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path} is damaged or cut off ({reason}); {_REMEDY}") from error
    is_table = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    )
    if not is_table:
        raise CheckpointError(f"{path} holds no table of tensors; give the weights of a model")
    return {**tensors}


def read_tensors(
    path: Path, device: torch.device, dtype_of: Callable[[str, Tensor], torch.dtype | None]
) -> dict[str, Tensor]:
    """The tensors of a file on a device, each in the dtype that `dtype_of` names; None leaves it out.

    If all are as they should be, they stay mapped. If not, all are copied, since one that is mapped
    holds what was read of its file; of that there are never more than `MAPPED_BYTES` and a tensor.
    """
    tensors = open_tensors(path)
    dtypes = {name: dtype_of(name, tensor) for name, tensor in tensors.items()}
    wanted = {name: dtype for name, dtype in dtypes.items() if dtype is not None}
    if device.type == "cpu" and all(tensors[name].dtype == wanted[name] for name in wanted):
        return {name: tensors[name].contiguous() for name in wanted}
    is_mapped = path.suffix == ".safetensors" or zipfile.is_zipfile(path)
    copies, read = dict[str, Tensor](), 0
    for name, dtype in wanted.items():
        if is_mapped and read >= MAPPED_BYTES:
            tensors, read = open_tensors(path), 0
        tensor = tensors.pop(name)
        read += tensor.nbytes
        copies[name] = tensor.to(device, dtype, copy=True).contiguous()
    return copies


def write_tensors(weights: dict[str, Tensor], path: Path) -> None:
    """Write a file whole or not at all, and remove other weights in its folder, which would be read instead.

    Raises:
        MambakitError: The folder cannot be written, or the disk is full.
    """
    with atomic_write(path) as partial:
        if path.name == PICKLE:
            write_pickle(weights, partial)
        else:
            save_file(weights, partial, metadata={"format": "pt"})
    for name in (SAFETENSORS, PICKLE):
        for other in (path.with_name(name), path.with_name(f"{name}.index.json")):
            if other != path:
                other.unlink(missing_ok=True)


def write_pickle(value: object, path: Path) -> None:
    """Write plain values and tensors as `torch.save` does, but let Ctrl-C stay KeyboardInterrupt.

    Raises:
        OSError: It cannot be written, as when the disk is full.
    """
    with open(path, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            # Interrupted in a write, torch complains of the file's length instead.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise
