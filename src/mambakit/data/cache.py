"""Prepared folders that are made once per corpus."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from mambakit.data.dataset import TokenDataset
from mambakit.data.manifest import VERSION, Manifest, is_prepared
from mambakit.data.preparation import Progress, prepare
from mambakit.data.sources import Sources, source_names
from mambakit.data.text import Errors, TextReader
from mambakit.data.tokenizer import Tokenizer, load_tokenizer
from mambakit.errors import DataError


def prepared(
    sources: Sources,
    cache_dir: str | os.PathLike[str],
    tokenizer: Tokenizer | str | os.PathLike[str] = "bytes",
    *,
    valid_fraction: float = 0.05,
    errors: Errors = "strict",
    text_key: str = "text",
    split: str = "train",
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Give the prepared folder of a corpus, made below `cache_dir` unless it is there already.

    It is made anew when the path, size or time of change of a file differs, or the tokenizer or an
    option. Of several processes let one go first. A dataset on the hub counts as unchanging.

    Args:
        sources: As for `prepare`; or one prepared folder, which is checked and returned.
        cache_dir: Where the prepared folders are kept.
        tokenizer: As for `prepare`, and so are the errors and the following arguments.
        valid_fraction: Part for validation.
        errors: "strict" or "replace".
        text_key: Key or column of the text.
        split: Split of a Hugging Face dataset.
        workers: Threads that tokenise.
        progress: Called now and then if the folder has to be made.

    Returns:
        The folder, for `TokenDataset`.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer)
    names = source_names(sources)
    if len(names) == 1 and is_prepared(names[0]):
        Manifest.load(names[0]).check_tokenizer(tokenizer, names[0])
        return Path(names[0])
    stamps = _stamps(TextReader(sources, errors=errors, text_key=text_key, split=split))
    options = [VERSION, tokenizer.fingerprint, valid_fraction, errors, text_key, split]
    key = hashlib.sha256(json.dumps([options, stamps]).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"tokens-{key}"
    if not _is_whole(folder):
        prepare(
            sources,
            folder,
            tokenizer,
            valid_fraction=valid_fraction,
            errors=errors,
            text_key=text_key,
            split=split,
            workers=workers,
            progress=progress,
        )
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a folder is there and nothing of it was damaged since."""
    try:
        for name in Manifest.load(folder).splits:
            TokenDataset(folder, name)
    except DataError:
        return False
    return True


def _stamps(reader: TextReader) -> list[tuple[str, int, int]]:
    """What tells whether the files are still the same."""
    stamps = []
    for source in reader.sources:
        if source.is_hub:
            stamps.append((str(source), 0, 0))
        else:
            status = source.path.stat()
            stamps.append((str(source.path.resolve()), status.st_size, status.st_mtime_ns))
    return stamps
