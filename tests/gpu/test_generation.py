"""The engine on a GPU: graphs against the modules one by one, lag, memory."""

from __future__ import annotations

import pytest
import torch

from mambakit.errors import ArgumentError
from mambakit.generate import Engine, PrefixCache, Request, SamplingOptions, decoding, generate
from mambakit.generate.prompt_graphs import PromptGraphs
from mambakit.generate.randomness import key_of, uniform
from mambakit.generate.sampling import Method, SamplingRows, sample
from mambakit.models import MambaConfig, MambaLanguageModel, Quantisation, quantise
from mambakit.models.fused_step import settler
from mambakit.ops.cuda import many_rows_step

pytestmark = pytest.mark.gpu

GREEDY = SamplingOptions(temperature=0)
ALL_ON = SamplingOptions(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
OPTIONS = [GREEDY, SamplingOptions(), ALL_ON]


@pytest.fixture(scope="module")
def model() -> MambaLanguageModel:
    torch.manual_seed(0)
    # 1000 ids in an embedding of 1024 rows.
    config = MambaConfig(d_model=128, n_layer=4, vocab_size=1000, pad_vocab_size_multiple=64)
    return MambaLanguageModel(config).cuda()


def requests(count: int, **fields: object) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [
        Request(
            prompt=torch.randint(1000, (length,), generator=generator),
            options=OPTIONS[number % 3],
            max_tokens=5 + number % 7,
            seed=number,
            **fields,
        )
        for number, length in enumerate(lengths)
    ]


def test_graphs_give_what_the_cpu_gives(model):
    """Logits of a random model are far enough apart that rounding does not change a token."""
    found = Engine(model, slots=5, chunk=16).generate(requests(12))
    expected = Engine(model.cpu(), slots=5, chunk=16).generate(requests(12))
    model.cuda()
    assert [done.tokens for done in found] == [done.tokens for done in expected]


def test_graphs_give_what_operations_one_by_one_give(model):
    graphs = Engine(model, slots=6).generate(requests(15, logprobs=2))
    plain = Engine(model, slots=6, cuda_graphs=False).generate(requests(15, logprobs=2))
    assert [done.tokens for done in graphs] == [done.tokens for done in plain]
    for one, other in zip(graphs, plain, strict=True):
        for output, expected in zip(one.outputs, other.outputs, strict=True):
            assert output.logprob == pytest.approx(expected.logprob, abs=1e-4)


LENGTHS = [1, 2, 3, 7, 63, 64, 65, 100, 127, 128]


@pytest.mark.parametrize(
    "fields",
    [{}, {"block": "h3"}, {"block": "ungated"}, {"A_init": "s4d-lin"}, {"d_conv": 2}],
    ids=str,
)
def test_graphs_read_prompts_of_any_length(fields):
    torch.manual_seed(0)
    model = MambaLanguageModel(MambaConfig(d_model=64, n_layer=3, vocab_size=100, **fields)).cuda()
    graphs = PromptGraphs(model, 128)
    tokens = torch.randint(100, (1, 128))
    _, before = model.prefill(tokens[:, :5].cuda())
    for start in (None, before):
        read = [graphs.read(tokens[:, :length], start) for length in LENGTHS]
        for length, (logits, state) in zip(LENGTHS, read, strict=True):
            expected, after = model.prefill(tokens[:, :length].cuda(), start)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            for ours, truth in zip(state.layers, after.layers, strict=True):
                torch.testing.assert_close(ours.conv_state, truth.conv_state, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(ours.ssm_state, truth.ssm_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_graphs_read_prompts_in_half_precision(bits):
    torch.manual_seed(0)
    model = MambaLanguageModel(MambaConfig(d_model=256, n_layer=3, vocab_size=100))
    if bits is not None:
        quantise(model, Quantisation(bits=bits))
    model, tokens = model.to("cuda", torch.bfloat16), torch.randint(100, (1, 128))
    graphs = PromptGraphs(model, 128)
    for length in LENGTHS:
        logits, state = graphs.read(tokens[:, :length], None)
        expected, after = model.prefill(tokens[:, :length].cuda())
        scale = float(expected.abs().max())
        torch.testing.assert_close(logits, expected, rtol=2**-6, atol=2**-6 * scale)
        for ours, truth in zip(state.layers, after.layers, strict=True):
            largest = float(truth.ssm_state.abs().max())
            torch.testing.assert_close(
                ours.ssm_state, truth.ssm_state, rtol=2**-5, atol=2**-6 * largest
            )


def test_padding_does_not_decide_what_comes_out(model):
    """What an earlier chunk has left behind in a graph's memory is not seen."""
    graphs = PromptGraphs(model, 64)
    tokens = torch.randint(1000, (1, 64))
    logits, state = graphs.read(tokens[:, :20], None)
    graphs.read(tokens.flip(1), state)
    again, after = graphs.read(tokens[:, :20], None)
    assert torch.equal(logits, again)
    for ours, truth in zip(after.layers, state.layers, strict=True):
        assert torch.equal(ours.ssm_state, truth.ssm_state)
        assert torch.equal(ours.conv_state, truth.conv_state)


def test_long_prompts_by_graphs(model):
    generator = torch.Generator().manual_seed(2)
    long = [
        Request(prompt=torch.randint(1000, (length,), generator=generator), options=GREEDY, max_tokens=8)
        for length in (1, 127, 128, 129, 300, 513, 1000)
    ]  # fmt: skip
    graphs = Engine(model, slots=3, chunk=128).generate(long)
    plain = Engine(model, slots=3, chunk=128, cuda_graphs=False).generate(long)
    assert [done.tokens for done in graphs] == [done.tokens for done in plain]


@pytest.fixture
def deferred(monkeypatch):
    """States, wherever they can be."""
    monkeypatch.setattr(many_rows_step, "LEAST_WIDTH_TO_DEFER", 0)
    monkeypatch.setattr(many_rows_step, "FEWEST_ROWS_TO_DEFER", 0)


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize(
    ("slots", "d_model"), [(8, 768), (20, 768), (20, 128), (8, 128), (130, 128)]
)
def test_a_request_gets_the_same_bits_alone(slots, d_model, cuda_graphs, deferred):
    """Of up to 8 rows in one kernel, of many, of kernels with products of their own, and of the library's."""
    torch.manual_seed(0)
    config = MambaConfig(d_model=d_model, n_layer=3, vocab_size=1000)
    bfloat16 = MambaLanguageModel(config).cuda().bfloat16()
    engine = Engine(bfloat16, slots=slots, cuda_graphs=cuda_graphs, batch_invariant=True)
    several = requests(2 * slots, logprobs=2)
    together = engine.generate(several)
    for number in (0, 1, 2, slots + 3):
        assert engine.generate([several[number]]) == [together[number]]


def test_states_are_settled_when_fewer_requests_are_left(monkeypatch, deferred):
    """Steps of many rows defer states; those of up to 8 do not know of it, and none changes a bit for that."""
    torch.manual_seed(0)
    config = MambaConfig(d_model=768, n_layer=3, vocab_size=1000)
    bfloat16 = MambaLanguageModel(config).cuda().bfloat16()
    several = [
        Request(prompt=[number, 7, 9], options=GREEDY, max_tokens=6 + 2 * number, logprobs=1)
        for number in range(20)
    ]
    settled = []

    def counted(model, state, deferred):
        settle = settler(model, state, deferred)
        return lambda: (settled.append(state.batch_size), settle())

    monkeypatch.setattr(decoding, "settler", counted)
    engine = Engine(bfloat16, slots=20)
    settled.clear()
    found = engine.generate(several)
    assert settled == [8]
    monkeypatch.setattr(decoding, "should_defer", lambda *_: False)
    expected = Engine(bfloat16, slots=20).generate(several)
    assert settled == [8]
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_again(dtype):
    torch.manual_seed(0)
    config = MambaConfig(d_model=128, n_layer=4, vocab_size=1000)
    model = MambaLanguageModel(config).to("cuda", dtype)
    engine = Engine(model, slots=4)
    first, second = engine.generate(requests(9)), engine.generate(requests(9))
    assert [done.tokens for done in first] == [done.tokens for done in second]


def test_a_stop_id_ends_a_request_and_the_row_is_used_again(model):
    engine = Engine(model, slots=1)
    [free] = engine.generate([Request(prompt=[1, 2], max_tokens=20, seed=0)])
    stop = free.tokens[7]
    ending = Request(prompt=[1, 2], max_tokens=20, seed=0, stop_ids=[stop])
    [ended, again] = engine.generate([ending, Request(prompt=[1, 2], max_tokens=20, seed=0)])
    assert ended.tokens == free.tokens[: free.tokens.index(stop)]
    assert again.tokens == free.tokens


def test_streaming_cancelling_and_prefixes(model):
    engine = Engine(model, slots=2, chunk=8, prefix_cache=PrefixCache(2**30))
    [expected] = engine.generate([Request(prompt=[3] * 20, max_tokens=9, seed=1)])
    endless = engine.submit(Request(prompt=[4], max_tokens=10**6))
    with engine:
        handle = engine.submit(Request(prompt=[3] * 20, max_tokens=9, seed=1))
        assert [output.token for output in handle] == expected.tokens
        assert handle.result().reused_tokens == 16
        endless.cancel()
        assert endless.result().finish_reason == "cancelled"


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_gpu_in_a_step(model):
    """No operation of a step synchronises; only reading the tokens does, one step late."""
    engine = Engine(model, slots=4, cuda_graphs=False)
    handles = [engine.submit(request) for request in requests(3)]
    engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine._decoder.step(Method.CUT)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for handle in handles:
        handle.cancel()


def test_logits_that_are_not_finite(model):
    broken = MambaLanguageModel(model.config).cuda()
    with torch.no_grad():
        broken.backbone.norm_f.weight[0] = float("nan")
    with pytest.raises(ArgumentError, match="logits: got NaN or infinite numbers"):
        generate(broken, [[1]], max_tokens=2)


def test_as_many_slots_as_fit_are_named(model):
    with pytest.raises(ArgumentError, match=r"the memory of cuda:0 is enough for [1-9]\d*;"):
        Engine(model, slots=10**8)


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "plain", "all"])
def test_sampling_is_that_of_the_cpu(options):
    logits, seen = torch.randn(64, 5000) * 3, torch.rand(64, 5000) < 0.1
    rows = SamplingRows(
        *(
            torch.cat(parts)
            for parts in zip(
                *(SamplingRows.of(options, 5000, s, 7) for s in range(64)), strict=True
            )
        )
    )
    expected = sample(logits, rows, Method.of(options), seen)
    on_gpu = SamplingRows(rows.reals.cuda(), rows.integers.cuda())
    found = sample(logits.cuda(), on_gpu, Method.of(options), seen.cuda())
    assert (
        found.cpu() == expected
    ).sum() >= 63  # By rounding, a number may fall on the other side.


def test_random_numbers_are_those_of_the_cpu():
    keys = torch.tensor([key_of(seed) for seed in range(1000)])
    positions = torch.arange(1000) * 12345
    assert torch.equal(uniform(keys.cuda(), positions.cuda()).cpu(), uniform(keys, positions))
