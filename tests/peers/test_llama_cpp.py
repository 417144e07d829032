"""GGUF files in llama.cpp: the same greedy tokens. It comes with the package cyllama, and with llama-cpp-python."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mambakit.data import load_tokenizer
from mambakit.models import MambaConfig, MambaLanguageModel, save_model

PROMPT = list(b"Hello w")
TEXT = "Hé, it's 1234 o'clock:\n\n\tdef f(x):  return x\\0\0 → 日本"
VARIANTS = {
    "default": {},
    "untied, norms": {"tie_embeddings": False, "mixer_norm_epsilon": 1e-5, "d_state": 8},
    "odd sizes": {"d_model": 24, "d_state": 5, "d_conv": 3, "dt_rank": 3, "norm_epsilon": 1e-3},
}
# In a process of its own, since llama.cpp writes to the terminal and may end the process.
BY_CYLLAMA = """
import sys
import cyllama.llama.llama_cpp as llama

path, text, count, *prompt = sys.argv[1:]
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
text = bytes.fromhex(text).decode()
if model.get_vocab().vocab_type:
    print("text", *model.get_vocab().tokenize(text, False, False))
"""
BY_LLAMA_CPP_PYTHON = """
import itertools
import sys
from llama_cpp import Llama

path, text, count, *prompt = sys.argv[1:]
model = Llama(path, verbose=False)
tokens = model.generate(list(map(int, prompt)), temp=0.0, repeat_penalty=1.0)
print("tokens", *itertools.islice(tokens, int(count)))
print("text", *model.tokenize(bytes.fromhex(text), add_bos=False, special=False))
"""
PROGRAMS = {"cyllama": BY_CYLLAMA, "llama_cpp": BY_LLAMA_CPP_PYTHON}


def make_model(**fields) -> MambaLanguageModel:
    config = MambaConfig(
        **{"d_model": 64, "n_layer": 2, "vocab_size": 257, "pad_vocab_size_multiple": 1, **fields}
    )
    model = MambaLanguageModel(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def lines(model, folder, tokenizer=None, package="cyllama") -> dict[str, list[int]]:
    """What llama.cpp makes of a model, by the first word of its lines."""
    if not find_spec(package):  # Imported in the other process alone.
        pytest.skip(f"needs {package}")
    save_model(model, folder, "gguf", tokenizer)
    arguments = [str(folder / "model.gguf"), TEXT.encode().hex(), "24", *map(str, PROMPT)]
    command = [sys.executable, "-c", PROGRAMS[package], *arguments]
    result = subprocess.run(command, capture_output=True, check=True)
    words = [line.split() for line in result.stdout.decode(errors="replace").splitlines()]
    return {w[0]: list(map(int, w[1:])) for w in words if w and w[0] in ("tokens", "text")}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_same_greedy_tokens(tmp_path, fields):
    model = make_model(**fields)
    expected = model.generate([PROMPT], max_tokens=24, temperature=0)
    assert lines(model, tmp_path) == {"tokens": expected[0]}


@pytest.mark.parametrize("package", PROGRAMS)
def test_a_tokenizer_of_bytes(tmp_path, package):
    model = make_model()
    found = lines(model, tmp_path, load_tokenizer("bytes"), package)
    assert found["tokens"] == model.generate([PROMPT], max_tokens=24, temperature=0)[0]
    assert found["text"] == list(TEXT.encode())


def test_a_tokenizer_of_pairs(tmp_path):
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    pairs.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    pairs.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    model = make_model(vocab_size=tokenizer.vocab_size, pad_vocab_size_multiple=8)
    found = lines(model, tmp_path / "out", tokenizer)
    assert found["text"] == tokenizer.encode(TEXT).tolist()
    assert len(found["text"]) < len(TEXT.encode())
