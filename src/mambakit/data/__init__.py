"""Text in, batches out: tokenizers, corpora, token files, the loader.

    documents / TextReader   text from files, folders, globs, jsonl, parquet, Hugging Face datasets
    load_tokenizer           bytes (default) or any `tokenizer.json`
    prepare, prepared        text -> folder of memory-mapped token files with a manifest
    TokenDataset             one split of such a folder
    Loader, windows          shuffled endless batches for training, ordered ones for evaluation

Names are loaded on first use; only the loader needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mambakit.lazy import attach

if TYPE_CHECKING:
    from mambakit.data.cache import prepared as prepared
    from mambakit.data.dataset import TokenDataset as TokenDataset
    from mambakit.data.loader import Batch as Batch
    from mambakit.data.loader import Loader as Loader
    from mambakit.data.loader import windows as windows
    from mambakit.data.manifest import Manifest as Manifest
    from mambakit.data.preparation import Progress as Progress
    from mambakit.data.preparation import prepare as prepare
    from mambakit.data.text import TextReader as TextReader
    from mambakit.data.text import documents as documents
    from mambakit.data.tokenizer import BytesTokenizer as BytesTokenizer
    from mambakit.data.tokenizer import JsonTokenizer as JsonTokenizer
    from mambakit.data.tokenizer import Tokenizer as Tokenizer
    from mambakit.data.tokenizer import load_tokenizer as load_tokenizer

_EXPORTS = {
    "Batch": "mambakit.data.loader",
    "BytesTokenizer": "mambakit.data.tokenizer",
    "JsonTokenizer": "mambakit.data.tokenizer",
    "Loader": "mambakit.data.loader",
    "Manifest": "mambakit.data.manifest",
    "Progress": "mambakit.data.preparation",
    "TextReader": "mambakit.data.text",
    "TokenDataset": "mambakit.data.dataset",
    "Tokenizer": "mambakit.data.tokenizer",
    "documents": "mambakit.data.text",
    "load_tokenizer": "mambakit.data.tokenizer",
    "prepare": "mambakit.data.preparation",
    "prepared": "mambakit.data.cache",
    "windows": "mambakit.data.loader",
}
__all__ = [
    "Batch",
    "BytesTokenizer",
    "JsonTokenizer",
    "Loader",
    "Manifest",
    "Progress",
    "TextReader",
    "TokenDataset",
    "Tokenizer",
    "documents",
    "load_tokenizer",
    "prepare",
    "prepared",
    "windows",
]

__getattr__, __dir__ = attach(__name__, _EXPORTS)
