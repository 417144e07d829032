from __future__ import annotations

import pytest
import torch

from mambakit.errors import ArgumentError
from mambakit.generate import SamplingOptions, generate, generation, stream
from mambakit.models import MambaConfig, MambaLanguageModel

GREEDY = SamplingOptions(temperature=0)
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7], [1] * 11]


@pytest.fixture(scope="module")
def model() -> MambaLanguageModel:
    torch.manual_seed(0)
    # 50 ids in an embedding of 64 rows: the last 14 must never be drawn.
    config = MambaConfig(
        d_model=16, n_layer=2, vocab_size=50, pad_vocab_size_multiple=64, tie_embeddings=False
    )
    return MambaLanguageModel(config)


def by_hand(model: MambaLanguageModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        logits, _ = model(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1, :50].argmax()))
    return tokens[len(prompt) :]


def test_greedy_is_the_argmax_of_forward(model):
    for prompt in PROMPTS:
        assert generate(model, [prompt], GREEDY, max_tokens=12) == [by_hand(model, prompt, 12)]


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        SamplingOptions(),
        SamplingOptions(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3),
    ],
)
def test_ragged_prompts_at_once_equal_one_at_a_time(model, options):
    together = generate(model, PROMPTS, options, max_tokens=20, seed=5, stop_ids=[3, 30])
    alone = [
        generate(model, [prompt], options, max_tokens=20, seed=5 + row, stop_ids=[3, 30])[0]
        for row, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    assert len({len(tokens) for tokens in together}) > 1 or options is GREEDY


def test_seeds(model):
    def run(seed):
        return generate(model, PROMPTS, max_tokens=15, seed=seed)

    assert run(1) == run(1)
    assert run(1) == run([1, 2, 3, 4])
    assert run(1) != run(2)
    assert run(None) != run(None)
    same = generate(model, [[1, 2]] * 2, max_tokens=15, seed=1)
    assert same[0] != same[1]


def test_the_global_random_state_is_left_alone(model):
    before = torch.get_rng_state()
    generate(model, PROMPTS, max_tokens=3)
    generate(model, PROMPTS, max_tokens=3, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_ids_are_never_drawn(model):
    with torch.no_grad():
        boosted = MambaLanguageModel(model.config)
        boosted.load_state_dict(model.state_dict())
        boosted.lm_head.weight[50:] *= 1000
    tokens = generate(boosted, PROMPTS, max_tokens=50, seed=0)
    assert max(map(max, tokens)) < 50
    assert generate(boosted, PROMPTS, GREEDY, max_tokens=5) == generate(
        model, PROMPTS, GREEDY, max_tokens=5
    )


def test_stop_ids_end_a_row_and_are_left_out(model):
    free = generate(model, PROMPTS, max_tokens=30, seed=0)
    stop = free[0][4]
    stopped = generate(model, PROMPTS, max_tokens=30, seed=0, stop_ids=[stop])
    for tokens, short in zip(free, stopped, strict=True):
        end = tokens.index(stop) if stop in tokens else len(tokens)
        assert short == tokens[:end]
    assert len(stopped[0]) <= 4


def test_stream_gives_the_tokens_round_by_round(model):
    expected = generate(model, PROMPTS, max_tokens=4, seed=0)
    pairs = list(stream(model, PROMPTS, max_tokens=4, seed=0))
    assert [row for row, _ in pairs] == [0, 1, 2, 3] * 4
    assert [[token for row, token in pairs if row == i] for i in range(4)] == expected


def test_until_ends_a_row_after_its_token(model):
    free = generate(model, PROMPTS, max_tokens=6, seed=0)
    counts = [0] * 4

    def until(row: int, token: int) -> bool:
        counts[row] += 1
        return counts[row] == 2 + row

    pairs = list(stream(model, PROMPTS, max_tokens=6, seed=0, until=until))
    for row in range(4):
        assert [token for r, token in pairs if r == row] == free[row][: 2 + row]


def test_finished_rows_leave_the_batch(model, before_steps):
    sizes = []
    before_steps(sizes.append)
    ends = {0: 1, 1: 3, 2: 3, 3: 5}
    counts = dict.fromkeys(ends, 0)

    def until(row: int, token: int) -> bool:
        counts[row] += 1
        return counts[row] == ends[row]

    list(stream(model, PROMPTS, max_tokens=9, seed=0, until=until))
    assert sizes == [3, 3, 1, 1]  # no step for the last token


def test_repetition_penalty_counts_prompt_and_continuation(model):
    options = SamplingOptions(temperature=0, repetition_penalty=1e9)
    # Positive logits become nothing: an id comes back only when all others are negative.
    [tokens] = generate(model, [[1, 2, 3]], options, max_tokens=15)
    assert len(set(tokens)) == 15
    assert not {1, 2, 3} & set(tokens)


def test_model_generate_takes_sampling_fields(model):
    assert model.generate(PROMPTS, max_tokens=5, temperature=0) == generate(
        model, PROMPTS, GREEDY, max_tokens=5
    )
    assert model.generate([torch.tensor([1, 2])], max_tokens=5, seed=1, top_k=5) == generate(
        model, [[1, 2]], SamplingOptions(top_k=5), max_tokens=5, seed=1
    )


def test_no_prompts(model):
    assert generate(model, []) == []


def test_nan_weights_end_in_a_clear_error(model):
    broken = MambaLanguageModel(model.config)
    with torch.no_grad():
        broken.backbone.norm_f.weight[0] = float("nan")
    with pytest.raises(ArgumentError, match="logits: got NaN or infinite numbers"):
        generate(broken, [[1]], max_tokens=2)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, r"prompts\[1\]: got no tokens, wanted at least one"),
        ([[1, 50]], {}, r"prompts\[0\]: got id 50, wanted 0 <= id < 50"),
        ([[1, -2]], {}, r"prompts\[0\]: got id -2"),
        ([1, 2], {}, r"prompts\[0\]: got 1, wanted a list of token ids"),
        (["abc"], {}, r"prompts\[0\]: got 'abc', wanted a list of token ids"),
        ([[1]], {"max_tokens": 0}, "max_tokens: got 0, wanted at least 1"),
        ([[1]], {"seed": -1}, "seed: got -1, wanted one from 0"),
        ([[1]], {"seed": [1, 2]}, r"seed: got \[1, 2\], .* one for each of 1 prompts"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(model, prompts, options, message):
    with pytest.raises(ArgumentError, match=message):
        stream(model, prompts, **options)


@pytest.mark.parametrize(
    ("count", "max_tokens", "expected"),
    [(1, 64, (False, False)), (1, 65, (True, False)), (32, 1, (False, False)), (33, 1, (False, True))],
)  # fmt: skip
def test_graphs_are_captured_where_they_pay(small, monkeypatch, count, max_tokens, expected):
    asked = {}
    monkeypatch.setattr(generation, "Engine", lambda model, **options: asked.update(options))
    generation.engine_for(small, count, max_tokens)
    assert (asked["cuda_graphs"], asked["prompt_graphs"]) == expected
