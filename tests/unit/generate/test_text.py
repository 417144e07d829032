from __future__ import annotations

import pytest
import torch

from mambakit.data.tokenizer import load_tokenizer
from mambakit.errors import ArgumentError
from mambakit.generate import SamplingOptions, generate, generate_text, stream_text
from mambakit.generate.randomness import key_of
from mambakit.models import MambaConfig, MambaLanguageModel
from mambakit.ops.likeliest import NOT_FINITE

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model() -> MambaLanguageModel:
    torch.manual_seed(0)
    return MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=257))


@pytest.fixture
def scripted(model, monkeypatch):
    """Let the model write given bytes, one text for each prompt, then the end of the document."""

    def install(*texts: bytes) -> MambaLanguageModel:
        scripts = [[*text, 256, 256] for text in texts]
        keys = [key_of(seed) for seed in range(len(texts))]

        def sample(logits, rows, method, seen):
            written = rows.integers[:, 1].tolist()
            return torch.tensor([scripts[keys.index(key)].pop(0) for key in written])

        monkeypatch.setattr("mambakit.generate.decoding.sample", sample)
        return model

    return install


def test_text_is_the_decoded_tokens(model):
    prompts = ["hello", "né", "x"]
    ids = [list(prompt.encode()) for prompt in prompts]
    tokens = generate(model, ids, max_tokens=30, seed=0, stop_ids=[256])
    texts = generate_text(model, BYTES, prompts, max_tokens=30, seed=0)
    assert texts == [bytes(row).decode(errors="replace") for row in tokens]


def test_an_empty_prompt_starts_a_document(model):
    greedy = SamplingOptions(temperature=0)
    [tokens] = generate(model, [[256]], greedy, max_tokens=8, stop_ids=[256])
    [text] = generate_text(model, BYTES, [""], greedy, max_tokens=8)
    assert text == bytes(tokens).decode(errors="replace")


def test_the_end_of_the_document_ends_the_text(scripted):
    model = scripted(b"one", b"three")
    assert generate_text(model, BYTES, ["a", "b"], seed=0) == ["one", "three"]


def test_stop_strings_end_each_text_for_itself(scripted):
    model = scripted(b"a. b.\n\nc", b"longer text. \n\n", "€uro.\nmore".encode())
    texts = generate_text(model, BYTES, ["x", "y", "z"], stop=["\n\n", ".\nm"], seed=0)
    assert texts == ["a. b.", "longer text. ", "€uro"]


def test_no_piece_holds_a_part_of_a_stop_string_or_of_a_character(scripted):
    model = scripted("é S STOP".encode(), "S€ ST".encode())
    pieces = list(stream_text(model, BYTES, ["a", "b"], stop=["STOP"], seed=0))
    assert [text for row, text in pieces if row == 0] == [
        "é",
        " ",
        "S ",
    ]
    assert [text for row, text in pieces if row == 1] == ["S€", " ", "ST"]


def test_max_tokens_counts_tokens(scripted):
    model = scripted("é€x".encode())
    assert generate_text(model, BYTES, ["a"], max_tokens=4, seed=0) == ["é�"]


@pytest.mark.parametrize(
    "function", [generate_text, lambda *args, **kw: list(stream_text(*args, **kw))]
)
def test_an_error_is_raised_after_the_text_that_was_held_back(model, monkeypatch, function):
    tokens = [ord("S"), NOT_FINITE]
    monkeypatch.setattr(
        "mambakit.generate.decoding.sample", lambda *args: torch.tensor([tokens.pop(0)])
    )
    with pytest.raises(ArgumentError, match="logits: got NaN or infinite numbers"):
        function(model, BYTES, ["a"], stop=["STOP"], max_tokens=2)


def test_a_tokenizer_of_another_model(model):
    small = MambaLanguageModel(MambaConfig(d_model=16, n_layer=1, vocab_size=100))
    with pytest.raises(ArgumentError, match="tokenizer: has 257 ids, wanted at most 100"):
        generate_text(small, BYTES, ["a"])
