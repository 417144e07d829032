from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mambakit.compat.mamba_ssm.models.config_mamba import MambaConfig
from mambakit.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mambakit.compat.mamba_ssm.utils.generation import (
    GenerationMixin,
    InferenceParams,
    decode,
    modify_logit_for_repetition_penalty,
    sample,
)
from mambakit.errors import ArgumentError, ShapeError


@pytest.fixture
def model():
    model = MambaLMHeadModel(
        MambaConfig(d_model=16, n_layer=2, vocab_size=24, tie_embeddings=False)
    )
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


PROMPTS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def greedy(model, prompt, count):
    """One token after the other, each by the whole model."""
    for _ in range(count):
        prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


@pytest.mark.parametrize("cg", [False, True])
def test_greedy(model, cg):
    found = model.generate(PROMPTS, max_length=15, cg=cg)
    assert torch.equal(found, greedy(model, PROMPTS, 10))


def test_scores(model):
    output = model.generate(PROMPTS, 9, return_dict_in_generate=True, output_scores=True)
    logits = model(output.sequences).logits[:, 4:-1]
    torch.testing.assert_close(torch.stack(output.scores, dim=1), logits, rtol=1e-4, atol=1e-4)
    assert model.generate(PROMPTS, 9, return_dict_in_generate=True).scores is None


def test_teacher(model):
    teacher = torch.randint(0, 24, (2, 8))
    output = model.generate(
        PROMPTS, 11, teacher_outputs=teacher, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(output.sequences[:, 5:8], teacher[:, 5:])
    assert torch.equal(output.sequences[:, 8:], greedy(model, output.sequences[:, :8], 3)[:, 8:])
    assert len(output.scores) == 6


def test_each_row_ends_with_its_own_end(model):
    """Upstream all have to end at the same step."""
    tokens = greedy(model, PROMPTS, 12)
    eos = int(tokens[0, 6])
    found = model.generate(PROMPTS, 17, eos_token_id=eos)
    for row, expected in zip(found, tokens, strict=True):
        ends = (expected[5:] == eos).nonzero()
        first = 5 + int(ends[0]) if len(ends) else 17
        count = min(first, found.shape[1])
        assert torch.equal(row[:count], expected[:count])
        assert (row[first:] == eos).all()


def test_ends_when_all_have(model):
    row = PROMPTS[:1]
    tokens = greedy(model, row, 6)
    found = model.generate(row, 50, eos_token_id=int(tokens[0, 5]))
    assert found.shape == (1, 6)


def test_only_the_first_ids(model):
    found = model.generate(PROMPTS, 30, vocab_size=5, top_k=0)
    assert (found[:, 5:] < 5).all()


def test_prompts_with_padding_in_front(model):
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    found = model.generate(PROMPTS, 15, attention_mask=mask)
    assert torch.equal(found[0], greedy(model, PROMPTS[:1], 10)[0])
    assert torch.equal(found[1, 2:], greedy(model, PROMPTS[1:, 2:], 10)[0])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1] * 5, [1, 1, 1, 0, 0]], "padding to the right"),
        ([[1] * 5, [0] * 5], "padding to the right"),
        ([[1] * 4] * 2, r"attention_mask: got shape \(2, 4\), wanted \(2, 5\)"),
    ],
)
def test_wrong_masks(model, mask, message):
    with pytest.raises((ArgumentError, ShapeError), match=message):
        model.generate(PROMPTS, 15, attention_mask=torch.tensor(mask))


def test_streamer(model):
    got = []
    streamer = SimpleNamespace(put=lambda t: got.append(t.clone()), end=lambda: got.append("end"))
    found = model.generate(PROMPTS, 8, streamer=streamer)
    assert got.pop() == "end"
    assert [t.shape for t in got] == [(2, 5), (2, 1), (2, 1), (2, 1)]
    assert torch.equal(torch.cat(got, dim=1), found)


def test_timing(model, capsys):
    model.generate(PROMPTS, 8, enable_timing=True)
    assert capsys.readouterr().out.startswith("Prompt processing + decoding time: ")


def test_a_penalty_on_what_was_there(model):
    found = model.generate(PROMPTS, 21, repetition_penalty=4.0)
    assert not torch.equal(found, model.generate(PROMPTS, 21))
    tokens = PROMPTS
    for _ in range(16):
        logits = model(tokens).logits[:, -1]
        for row, seen in zip(logits, tokens, strict=True):
            ids = seen.unique()
            row[ids] = torch.where(row[ids] > 0, row[ids] / 4, row[ids] * 4)
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, tokens)


def test_penalty():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    same = modify_logit_for_repetition_penalty(logits, torch.tensor([[0, 1, 0]]), 2.0)
    assert same is logits
    assert logits.tolist() == [[1.0, -4.0, 1.0, -1.0]]
    assert modify_logit_for_repetition_penalty(logits, torch.tensor([[0]])) is logits
    assert logits[0, 0] == 1.0


def frequencies(probs, **options):
    logits = torch.tensor(probs).log().expand(4000, -1)
    return torch.bincount(sample(logits, **options), minlength=len(probs)) / 4000


PROBS = [0.1, 0.4, 0.2, 0.3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 0, 0]),
        ({"top_k": 0}, PROBS),
        ({"top_k": 9}, PROBS),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 0, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 0, "top_p": 1.0}, PROBS),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 0, "min_p": 0.45}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 3, "min_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 0, "temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 1, "temperature": 0.0}, [0, 1, 0, 0]),
    ],
)
def test_samples_of_a_batch(options, expected):
    """Upstream min-p takes the logit of id 0 for the largest probability, and fails for two rows."""
    found = frequencies(PROBS, **options)
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=0.035, rtol=0)
    assert ((found > 0) == (torch.tensor(expected) > 0)).all()


def test_samples_leave_the_logits_alone():
    logits = torch.randn(3, 9)
    before = logits.clone()
    sample(logits, top_k=4, top_p=0.5, min_p=0.1, temperature=0.3)
    assert torch.equal(logits, before)


def test_wrong_top_p():
    with pytest.raises(ArgumentError, match=r"top_p: got 1\.5, wanted 0 to 1"):
        sample(torch.randn(1, 4), top_k=0, top_p=1.5)


def test_seeded_by_torch(model):
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(model.generate(PROMPTS, 25, top_k=0, min_p=0.01, temperature=1.3))
    assert torch.equal(*found)


def test_reset():
    params = InferenceParams(4, 2, 3, lengths_per_sample=torch.ones(2))
    params.reset(9, 5)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (9, 5, 0)
    assert not params.lengths_per_sample.any()
    InferenceParams(4, 2).reset(1, 1)


def test_any_model_can_be_decoded():
    """It is called as the authors' code calls it."""
    seen = []

    def count_up(tokens, inference_params, num_last_tokens):
        seen.append((tokens.shape[1], inference_params.seqlen_offset, num_last_tokens))
        return SimpleNamespace(logits=torch.eye(9)[(tokens[:, -1:] + 1) % 9])

    output = decode(torch.tensor([[1, 2, 3]]), count_up, 7)
    assert output.sequences.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert seen == [(3, 0, 1), (1, 3, 1), (1, 4, 1), (1, 5, 1)]


def test_mixin_needs_a_cache_of_the_model():
    with pytest.raises(NotImplementedError):
        GenerationMixin().allocate_inference_cache(1, 1)
