from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import tokenizers
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval; pip install 'mambakit[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook

from mambakit.data import BytesTokenizer, TokenDataset, load_tokenizer, prepare, windows
from mambakit.errors import ArgumentError
from mambakit.evaluate import count_bytes, score
from mambakit.evaluate.harness import HarnessModel
from mambakit.generate import SamplingOptions, generate_text
from mambakit.models import MambaConfig, MambaLanguageModel

BYTES = BytesTokenizer()
EOS = BYTES.eos_id


@pytest.fixture
def model() -> MambaLanguageModel:
    return MambaLanguageModel(MambaConfig(d_model=24, n_layer=2, vocab_size=257)).eval()


def requests(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def likelihoods(harness: HarnessModel, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return harness.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def rolling(harness: HarnessModel, *texts: str) -> list[float]:
    some = requests("loglikelihood_rolling", *((text,) for text in texts))
    return harness.loglikelihood_rolling(some, disable_tqdm=True)


def written(harness: HarnessModel, *contexts_and_options) -> list[str]:
    some = requests("generate_until", *contexts_and_options)
    return harness.generate_until(some, disable_tqdm=True)


@torch.no_grad()
def directly(model: MambaLanguageModel, ids: list[int], last: int) -> float:
    """Log-probability of the last so many ids, in float64."""
    exact = MambaLanguageModel(model.config).double()
    exact.load_state_dict(model.state_dict())
    logits = exact(torch.tensor([ids[:-1]]))[0][0, -last:]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[-last:])[:, None]).sum().item()


@pytest.fixture
def reciting(reciting_model: MambaLanguageModel) -> HarnessModel:
    return HarnessModel(reciting_model, BYTES)


@pytest.fixture
def merging(tmp_path: Path):
    """Ids of "a", "b", "c", " " and "ab"; byte pairs merge wherever they meet."""
    vocabulary = {"a": 0, "b": 1, "c": 2, "Ġ": 3, "ab": 4, "<|endoftext|>": 5}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b")]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path / "tokenizer.json")


def test_a_continuation_after_its_context(model):
    harness = HarnessModel(model, BYTES)
    [(short, _), (long, _)] = likelihoods(harness, ("one", " two"), ("a longer context", "é"))
    assert short == pytest.approx(directly(model, [*b"one two"], 4), rel=1e-5)
    assert long == pytest.approx(directly(model, [*"a longer contexté".encode()], 2), rel=1e-5)


def test_greedy_continuations(reciting):
    pairs = [("abc", "def"), ("abc", "deg"), ("abc", "e")]
    assert [is_greedy for _, is_greedy in likelihoods(reciting, *pairs)] == [True, False, False]


def test_an_empty_context_is_a_new_document(model):
    harness = HarnessModel(model, BYTES)
    [(value, _), (space, _)] = likelihoods(harness, ("", "two"), ("  ", "two"))
    assert value == pytest.approx(directly(model, [EOS, *b"two"], 3), rel=1e-5)
    # lm_eval moves the spaces at the end of a context to the continuation.
    assert space == pytest.approx(directly(model, [EOS, *b"  two"], 5), rel=1e-5)


def test_an_empty_continuation(model):
    assert likelihoods(HarnessModel(model, BYTES), ("one", "")) == [(0.0, True)]


def test_tokens_that_meet_at_the_border(merging):
    model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=1, vocab_size=6)).eval()
    harness = HarnessModel(model, merging)
    assert merging.encode("cab").tolist() == [2, 4]
    [(split, _), (melted, _), (behind, _)] = likelihoods(
        harness, ("c", "ab"), ("ca", "b"), ("ca", "bc")
    )
    assert split == pytest.approx(directly(model, [2, 4], 1), rel=1e-5)
    # Together they are [c, ab], no longer than the context: "b" is then encoded by itself.
    assert melted == pytest.approx(directly(model, [2, 0, 1], 1), rel=1e-5)
    # [c, ab, c] is cut after as many ids as the context has.
    assert behind == pytest.approx(directly(model, [2, 0, 2], 1), rel=1e-5)


def test_the_separator_in_front_of_every_context(model):
    harness = HarnessModel(model, BYTES, add_bos_token=True)
    [(value, _), (empty, _)] = likelihoods(harness, ("one", " two"), ("", "two"))
    assert value == pytest.approx(directly(model, [EOS, *b"one two"], 4), rel=1e-5)
    assert empty == pytest.approx(directly(model, [EOS, *b"two"], 3), rel=1e-5)
    assert rolling(harness, "two")[0] == empty


def test_a_separator_is_not_doubled(merging):
    model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=1, vocab_size=6)).eval()
    harness = HarnessModel(model, merging, add_bos_token=True)
    assert harness.tok_encode("<|endoftext|>ca") == [5, 2, 0]
    assert harness.tok_encode("ca") == [5, 2, 0]
    assert harness.tok_encode("ca", add_special_tokens=False) == [2, 0]


def test_a_context_beyond_max_length_loses_its_beginning(model, caplog):
    harness = HarnessModel(model, BYTES, max_length=6)
    with caplog.at_level(logging.WARNING):
        [(value, _), (fits, _)] = likelihoods(harness, ("0123456789", "abc"), ("0123", "abc"))
    # Six are read, of which the last two are of the continuation.
    assert value == pytest.approx(directly(model, [*b"6789abc"], 3), rel=1e-5)
    assert fits == pytest.approx(directly(model, [*b"0123abc"], 3), rel=1e-5)
    assert caplog.text.count("contexts are cut to their ends, for max_length is 6") == 1
    with pytest.raises(ArgumentError, match="max_length: got 6, but a task needs 6 tokens"):
        likelihoods(harness, ("0", "abcdefg"))


def test_a_whole_text(model):
    harness = HarnessModel(model, BYTES)
    values = rolling(harness, "two and two", "", "é")
    assert values[0] == pytest.approx(directly(model, [EOS, *b"two and two"], 11), rel=1e-5)
    assert values[1] == 0.0
    assert values[2] == pytest.approx(directly(model, [EOS, *"é".encode()], 2), rel=1e-5)


def test_a_long_text_is_read_in_one_go_or_in_windows(model):
    text = "".join(f"{n * n} " for n in range(450))
    ids = list(text.encode())
    [whole] = rolling(HarnessModel(model, BYTES), text)
    assert whole == pytest.approx(directly(model, [EOS, *ids], len(ids)), rel=1e-5)
    [some] = rolling(HarnessModel(model, BYTES, max_length=1000), text)
    parts = [directly(model, [EOS, *ids[:1000]], 1000)]
    for end in range(2000, len(ids), 1000):
        parts.append(directly(model, ids[end - 1001 : end], 1000))
    rest = len(ids) % 1000
    parts.append(directly(model, ids[-1001:], rest))
    assert some == pytest.approx(sum(parts), rel=1e-5)


def test_a_whole_text_agrees_with_perplexity(model, tmp_path):
    texts = ["one and two\n" * 9, "three\n" * 20]

    def nats(count: int) -> float:
        for number, text in enumerate(texts[:count]):
            (tmp_path / f"{number}.txt").write_text(text)
        prepare(sorted(tmp_path.glob("*.txt")), tmp_path / f"of-{count}", BYTES, valid_fraction=0)
        dataset = TokenDataset(tmp_path / f"of-{count}", "train", BYTES)
        batches = windows(dataset, len(dataset) - 1, 1, documents=True)
        return score(model, batches, count_bytes(BYTES)).nats

    # There the separator after a document is predicted too.
    end = directly(model, [EOS, *texts[1].encode(), EOS], 1)
    [ours] = rolling(HarnessModel(model, BYTES), texts[1])
    assert ours + end == pytest.approx(nats(1) - nats(2), rel=1e-5)


GREEDY = {"until": ["\n"], "max_gen_toks": 12}


def test_text_is_continued_as_by_generate(model):
    contexts = ["one", "one two three", "é" * 90, "one"]
    ours = written(HarnessModel(model, BYTES), *((context, GREEDY) for context in contexts))
    greedy = SamplingOptions(temperature=0)
    assert ours == generate_text(model, BYTES, contexts, greedy, max_tokens=12, stop=["\n"])
    assert ours[0] == ours[3]


def test_an_empty_context_is_continued_as_a_new_document(model):
    [ours] = written(HarnessModel(model, BYTES), ("", GREEDY))
    expected = generate_text(model, BYTES, [""], SamplingOptions(temperature=0), max_tokens=12,
                             stop=["\n"])  # fmt: skip
    assert [ours] == expected


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"until": ["h"]}, "defg"),
        ({"until": "h"}, "defg"),
        ({"until": ["x", "fgh", "gh"]}, "de"),
        ({"until": ["gh", "f"]}, "de"),
        ({"until": ["fgh", ""], "max_gen_toks": 20}, "de"),
        ({"max_gen_toks": 3}, "def"),
        ({"until": [], "max_new_tokens": 2}, "de"),
        ({"until": ["h"], "do_sample": False, "temperature": 0.7}, "defg"),
        ({"until": ["h"], "do_sample": True, "top_k": 1}, "defg"),
        ({"until": ["h"], "temperature": 0.5, "top_p": 0.9, "top_k": 0}, "defg"),
        ({"until": ["h"], "do_sample": True, "min_p": 0.5, "repetition_penalty": 1.1}, "defg"),
        ({"until": ["h"], "num_beams": 1}, "defg"),
    ],
)
def test_where_text_ends_and_how_it_is_drawn(reciting, options, text):
    before = json.dumps(options)
    assert written(reciting, ("abc", options)) == [text]
    assert json.dumps(options) == before


def test_text_ends_with_the_document_and_after_256_tokens(reciting, reciting_model):
    assert written(reciting, ("abc", {"until": []})) == [
        bytes(range(100, 256)).decode("utf-8", "replace")
    ]
    reciting_model.lm_head.weight.data[97] = 20 * torch.eye(264)[97]  # An "a" after an "a".
    reciting_model.lm_head.weight.data[98] = 0
    assert written(reciting, ("a", {"until": []})) == ["a" * 256]


def test_drawn_texts_differ_from_repeat_to_repeat_but_not_from_run_to_run(model):
    drawn = {"until": [], "max_gen_toks": 9, "do_sample": True}
    first, again = (
        written(HarnessModel(model, BYTES), ("a", drawn), ("a", drawn)) for _ in range(2)
    )
    assert first == again
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams: there is no beam search"),
        ({"typical_p": 0.9, "until": ["x"]}, "generation_kwargs: got typical_p, wanted no others"),
        ({"do_sample": True, "top_p": 2.0}, "top_p: got 2.0"),
        ({"max_gen_toks": 0}, "max_tokens: got 0"),
    ],
)
def test_options_that_cannot_be_followed(model, options, message):
    with pytest.raises(ArgumentError, match=message):
        written(HarnessModel(model, BYTES), ("a", options))


def test_a_prompt_beyond_max_length_loses_its_beginning(model):
    cut = written(HarnessModel(model, BYTES, max_length=20), ("0123456789", {"max_gen_toks": 14}))
    assert cut == written(HarnessModel(model, BYTES), ("456789", {"max_gen_toks": 14}))
    with pytest.raises(ArgumentError, match="max_length: got 20, but a task needs 20 tokens"):
        written(HarnessModel(model, BYTES, max_length=20), ("a", {"max_gen_toks": 20}))


def test_every_answer_is_the_same_at_batch_1_and_16(model):
    one, many = (HarnessModel(model, BYTES, batch_size=size) for size in (1, 16))
    texts = [f"{n} and {n * n}" * (1 + n % 4) for n in range(20)]
    pairs = [(text, ending) for text in texts for ending in (" a", " bcd", " efghij")]
    assert likelihoods(one, *pairs) == likelihoods(many, *pairs)
    assert rolling(one, *texts) == rolling(many, *texts)
    prompts = [(text, GREEDY) for text in texts]
    assert written(one, *prompts) == written(many, *prompts)


class Recorder(CacheHook):
    def __init__(self):
        super().__init__(None)
        self.kept = {}

    def add_partial(self, attr, req, res):
        self.kept[attr, json.dumps(req)] = res


def test_answers_reach_the_cache_of_lm_eval(model):
    harness = HarnessModel(model, BYTES)
    harness.set_cache_hook(recorder := Recorder())
    pairs = [("one", " two"), ("one", " three")]
    answers = likelihoods(harness, *pairs)
    [total] = rolling(harness, "one")
    [text] = written(harness, ("one", GREEDY))
    assert recorder.kept == {
        ("loglikelihood", '["one", " two"]'): answers[0],
        ("loglikelihood", '["one", " three"]'): answers[1],
        ("loglikelihood_rolling", '["one"]'): total,
        ("generate_until", json.dumps(["one", GREEDY])): text,
    }


def test_progress_is_shown(model, capsys):
    harness = HarnessModel(model, BYTES)
    harness.loglikelihood(requests("loglikelihood", ("one", " two")))
    assert "Scoring: 100%" in capsys.readouterr().err
    harness.generate_until(requests("generate_until", ("one", GREEDY)))
    assert "Generating: 100%" in capsys.readouterr().err


def test_nothing_to_do(model):
    harness = HarnessModel(model, BYTES)
    assert (likelihoods(harness), rolling(harness), written(harness)) == ([], [], [])


def test_what_it_tells_of_itself(model):
    info = HarnessModel(model, BYTES, max_length=9).get_model_info()
    assert info["model_num_parameters"] == model.num_parameters()
    assert info["model_dtype"] == "torch.float32"
    assert info["max_length"] == 9
    assert math.isfinite(info["model_num_parameters"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"max_length": 0}, "max_length: got 0"),
    ],
)
def test_wrong_arguments(model, options, message):
    with pytest.raises(ArgumentError, match=message):
        HarnessModel(model, BYTES, **options)


def test_a_tokenizer_of_another_model():
    small = MambaLanguageModel(MambaConfig(d_model=8, n_layer=1, vocab_size=100))
    with pytest.raises(ArgumentError, match="tokenizer: has 257 ids"):
        HarnessModel(small, BYTES)
