"""The same answers as lm_eval's own model type "hf" gives, with transformers and the same weights."""

from __future__ import annotations

import pytest
import tokenizers
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lm_eval", reason="needs lm-eval; pip install 'mambakit[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mambakit.data import load_tokenizer
from mambakit.evaluate.harness import HarnessModel
from mambakit.models import MambaConfig, MambaLanguageModel

pytestmark = pytest.mark.filterwarnings("ignore")  # The peers' own.

TEXT = "the cat sat on the mat\nthe dog ate the cat's hat, naïvely\n" * 20
PAIRS = [
    ("the cat", " sat"), ("the cat", " sat on the mat"), ("the cat", " ate"), ("", "the dog"),
    ("the dog ate ", "the hat"), ("the cat's", "hat"), ("naï", "vely, the cat sat on the mat\n"),
    ("the cat sat on the mat\nthe dog ate the cat's hat " * 3, "and left"),
]  # fmt: skip
TEXTS = ["the cat", "", "the dog ate the cat's hat, naïvely\n" * 5]
PROMPTS = [("the cat", ["\n"]), ("the dog ate the", [" "]), ("hat, naï" * 9, ["the", "cat"])]


def instances(kind, *arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    folder = tmp_path_factory.mktemp("model")
    bpe.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.vocab_size, "pad_vocab_size_multiple": 1}
    model = MambaLanguageModel(MambaConfig(d_model=32, n_layer=3, **sizes))
    model.save_pretrained(folder / "hf", "huggingface", tokenizer)
    return folder / "hf"


@pytest.fixture(scope="module", params=[None, 24], ids=["whole", "cut"])
def both(request, folder):
    model = MambaLanguageModel.from_pretrained(folder).eval()
    ours = HarnessModel(model, load_tokenizer(folder), max_length=request.param)
    theirs = HFLM(
        str(folder), device="cpu", dtype="float32", batch_size=1, max_length=request.param or 999
    )
    return ours, theirs


def test_likelihoods(both):
    found, expected = (
        harness.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)
        for harness in both
    )
    assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], rel=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]


def test_whole_texts(both):
    kind = "loglikelihood_rolling"
    some = instances(kind, *((text,) for text in TEXTS))
    found, expected = (harness.loglikelihood_rolling(some, disable_tqdm=True) for harness in both)
    assert found == pytest.approx(expected, rel=1e-4)


def test_written_texts(both):
    options = ((prompt, {"until": until, "max_gen_toks": 16}) for prompt, until in PROMPTS)
    some = instances("generate_until", *options)
    found, expected = (harness.generate_until(some, disable_tqdm=True) for harness in both)
    assert found == expected
