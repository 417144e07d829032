"""GGUF files in llama.cpp: the same greedy tokens. It comes with the package cyllama."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mambakit.data import load_tokenizer
from mambakit.models import MambaConfig, MambaLanguageModel, save_model

pytest.importorskip("cyllama")

PROMPT = list(b"Hello w")
VARIANTS = {
    "default": {},
    "untied, norms": {"tie_embeddings": False, "mixer_norm_epsilon": 1e-5, "d_state": 8},
    "odd sizes": {"d_model": 24, "d_state": 5, "d_conv": 3, "dt_rank": 3, "norm_epsilon": 1e-3},
}
# In a process of its own, since llama.cpp writes to the terminal and may end the process.
GREEDY = """
import sys
import cyllama.llama.llama_cpp as llama

path, count, *prompt = sys.argv[1:]
llama.ggml_backend_load_all()
model = llama.LlamaModel(path, llama.LlamaModelParams())
context = llama.LlamaContext(model, llama.LlamaContextParams())
sampler = llama.LlamaSampler()
sampler.add_greedy()
tokens = list(map(int, prompt))
context.decode(llama.llama_batch_get_one(tokens, 0))
for _ in range(int(count)):
    tokens.append(sampler.sample(context, -1))
    context.decode(llama.llama_batch_get_one(tokens[-1:], len(tokens) - 1))
print("tokens", *tokens[len(prompt):])
text = bytes.fromhex("48e9").decode("latin-1") + " \\n\\0\\\\"
if model.get_vocab().vocab_type:
    print("text", *model.get_vocab().tokenize(text, False, False))
"""


def make_model(**fields) -> MambaLanguageModel:
    config = MambaConfig(
        **{"d_model": 64, "n_layer": 2, "vocab_size": 257, "pad_vocab_size_multiple": 1, **fields}
    )
    model = MambaLanguageModel(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def lines(model, folder, tokenizer=None) -> dict[str, list[int]]:
    """What llama.cpp makes of a model, by the first word of its lines."""
    save_model(model, folder, "gguf", tokenizer)
    command = [sys.executable, "-c", GREEDY, str(folder / "model.gguf"), "24", *map(str, PROMPT)]
    result = subprocess.run(command, capture_output=True, check=True)
    words = [line.split() for line in result.stdout.decode(errors="replace").splitlines()]
    return {w[0]: list(map(int, w[1:])) for w in words if w and w[0] in ("tokens", "text")}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_same_greedy_tokens(tmp_path, fields):
    model = make_model(**fields)
    expected = model.generate([PROMPT], max_tokens=24, temperature=0)
    assert lines(model, tmp_path) == {"tokens": expected[0]}


def test_a_tokenizer_of_bytes(tmp_path):
    model = make_model()
    found = lines(model, tmp_path, load_tokenizer("bytes"))
    assert found["tokens"] == model.generate([PROMPT], max_tokens=24, temperature=0)[0]
    assert found["text"] == list("Hé \n\0\\".encode())
