"""What llama.cpp does with the same weights, for cpu_generation.py; through llama-cpp-python, where it is installed."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mambakit.models import MambaLanguageModel, save_model
from report import Measurement, measure

NAMES = {
    "float32": "ALL_F32",
    "bfloat16": "MOSTLY_BF16",
    "float16": "MOSTLY_F16",
    "int8": "MOSTLY_Q8_0",
}
"""Their names of formats. Of int4 they have so many that none is ours."""


def is_installed() -> bool:
    """Whether there is something to compare with."""
    return importlib.util.find_spec("llama_cpp") is not None


def llama_cpp_speeds(
    model: MambaLanguageModel, name: str, prompt: int, steps: int
) -> tuple[Measurement, Measurement]:
    """Tokens a second of a prompt, and of one sequence that goes on from it.

    Args:
        model: Float32.
        name: Format, of `NAMES`.
        prompt: Tokens of the prompt.
        steps: How many more.
    """
    tokens = torch.randint(model.config.vocab_size, (prompt,)).tolist()
    with _opened(model, name, context=prompt + 2 * steps) as llama:

        def read() -> None:
            llama.reset()
            llama.eval(tokens)

        reading = measure(read, repeats=7).rate(prompt)
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            llama.eval(tokens[:1])
            seconds.append(time.perf_counter() - start)
    return reading, Measurement.of(seconds).rate(1)


@contextmanager
def _opened(model: MambaLanguageModel, name: str, context: int) -> Iterator[Any]:
    """The model in llama.cpp, with as many threads as PyTorch has."""
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder, "gguf")
        path = Path(folder) / "model.gguf"
        if name != "float32":
            options = llama_cpp.llama_model_quantize_default_params()
            options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{NAMES[name]}")
            path = Path(folder) / "changed.gguf"
            source = Path(folder) / "model.gguf"
            if llama_cpp.llama_model_quantize(bytes(source), bytes(path), options):
                raise RuntimeError(f"llama.cpp could not write {name}")
        threads = torch.get_num_threads()
        llama = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=context, n_ubatch=context,
            n_threads=threads, n_threads_batch=threads, verbose=False,
        )  # fmt: skip
        try:
            yield llama
        finally:
            llama.close()
