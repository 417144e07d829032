from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambakit.data.tokenizer import load_tokenizer
from mambakit.errors import ArgumentError
from mambakit.generate import Engine, PrefixCache, Request, SamplingOptions
from mambakit.generate.decoding import Decoder
from mambakit.generate.handle import Handle
from mambakit.generate.reading import MOST_READING
from mambakit.models import MambaConfig, MambaLanguageModel

GREEDY = SamplingOptions(temperature=0)
ALL_ON = SamplingOptions(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
BYTES = load_tokenizer("bytes")


@pytest.fixture
def steps(before_steps) -> list[int]:
    """Sizes of the batches that the model steps through."""
    sizes: list[int] = []
    before_steps(sizes.append)
    return sizes


@pytest.fixture
def chunks(small, monkeypatch) -> list[list[int]]:
    """What the model reads."""
    read: list[list[int]] = []
    prefill = small.prefill

    def recorded(tokens, state=None, **options):
        read.append(tokens[0].tolist())
        return prefill(tokens, state, **options)

    monkeypatch.setattr(small, "prefill", recorded)
    return read


def alone(model: MambaLanguageModel, request: Request, chunk: int) -> tuple[list[int], list]:
    [done] = Engine(model, slots=1, chunk=chunk).generate([request])
    return done.tokens, [(output.logprob, output.likeliest) for output in done.outputs]


REQUESTS = st.builds(
    Request,
    prompt=st.lists(st.integers(0, 49), min_size=1, max_size=30),
    options=st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0, 0.5, 1.0]),
        top_k=st.sampled_from([None, 5]),
        top_p=st.sampled_from([1.0, 0.8]),
        min_p=st.sampled_from([0.0, 0.05]),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
    ),
    max_tokens=st.integers(1, 12),
    stop_ids=st.lists(st.integers(0, 49), max_size=2),
    seed=st.integers(0, 2**63 - 1),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_request_does_not_depend_on_the_others_bit_for_bit(small, data):
    """Requests arrive and are cancelled at random steps; the others get what they get alone."""
    requests = data.draw(st.lists(REQUESTS, min_size=1, max_size=6))
    chunk = data.draw(st.integers(1, 12))
    engine = Engine(
        small,
        slots=data.draw(st.integers(1, 4)),
        chunk=chunk,
        prefix_cache=data.draw(st.sampled_from([None, PrefixCache(50_000)])),
    )
    engine._lag = data.draw(st.sampled_from([0, 1]))  # 1 is what it is on a GPU.
    cancelled = data.draw(st.sets(st.integers(0, len(requests) - 1)))
    handles = []
    for request in requests:
        handles.append(engine.submit(request))
        for _ in range(data.draw(st.integers(0, 4))):
            engine.step()
        for number in cancelled & set(range(len(handles))):
            if data.draw(st.booleans()):
                handles[number].cancel()
    for number in cancelled:
        handles[number].cancel()
    while engine.step():
        pass
    assert engine.free_slots == engine._size
    assert engine._decoder.slots.taken == 0
    for number, (request, handle) in enumerate(zip(requests, handles, strict=True)):
        done = handle.result()
        tokens, logprobs = alone(small, request, chunk)
        found = [(output.logprob, output.likeliest) for output in done.outputs]
        if done.finish_reason == "cancelled":
            assert number in cancelled
            tokens, logprobs = tokens[: len(done.tokens)], logprobs[: len(done.tokens)]
        assert done.tokens == tokens
        assert found == logprobs


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"bias": True}, torch.float32),  # No compiled step of the whole model: module by module.
        ({"A_init": "s4d-lin"}, torch.float32),
        ({"selective": ("dt",)}, torch.float32),
        ({}, torch.bfloat16),
    ],
    ids=["modules", "complex", "constant B and C", "bfloat16"],
)
def test_other_models_bit_for_bit(fields, dtype):
    torch.manual_seed(0)
    config = MambaConfig(d_model=24, n_layer=2, vocab_size=50, tie_embeddings=False, **fields)
    model = MambaLanguageModel(config).to(dtype)
    requests = [
        Request(
            prompt=torch.randint(50, (3 * n + 1,)),
            options=(GREEDY, ALL_ON, SamplingOptions())[n % 3],
            max_tokens=3 + n % 4,
            seed=n,
            logprobs=1,
        )
        for n in range(7)
    ]
    together = Engine(model, slots=5, chunk=4).generate(requests)
    for request, done in zip(requests, together, strict=True):
        [expected] = Engine(model, slots=1, chunk=4).generate([request])
        assert done == expected


def test_prompts_in_chunks_give_what_they_give_at_once(small):
    prompt = torch.randint(50, (41,)).tolist()
    expected, _ = alone(small, Request(prompt=prompt, options=GREEDY, max_tokens=10), chunk=512)
    for chunk in (1, 7, 41):
        request = Request(prompt=prompt, options=GREEDY, max_tokens=10)
        assert alone(small, request, chunk)[0] == expected


def test_a_long_prompt_stalls_nobody(small, steps, chunks):
    engine = Engine(small, slots=3, chunk=4)
    first = engine.submit(Request(prompt=[1], max_tokens=100))
    engine.step()
    long = engine.submit(Request(prompt=[2] * 40, max_tokens=3))
    short = engine.submit(Request(prompt=[3, 4], max_tokens=3))
    for _ in range(4):
        engine.step()
    assert len(first.poll()) == 5  # one in every step
    assert len(short.poll()) == 3  # its prompt was read in the long one's second turn
    assert long.poll() == []
    assert chunks == [[1], [2] * 4, [3, 4], [2] * 4, [2] * 4]
    assert steps == [1, 1, 2, 2]


def test_few_prompts_are_read_in_turns(small):
    engine = Engine(small, slots=20, chunk=2)
    handles = [engine.submit(Request(prompt=[n] * 5, max_tokens=1)) for n in range(12)]
    for _ in range(20):
        engine.step()
        assert len(engine._reader.reading) <= MOST_READING == 8
    assert all(len(handle.result().tokens) == 1 for handle in handles)


def test_the_default_chunk_of_a_cpu(small, chunks):
    Engine(small).generate([Request(prompt=[1] * 300, max_tokens=1)])
    assert [len(chunk) for chunk in chunks] == [128, 128, 44]


def test_several_short_prompts_are_read_in_one_step(small, chunks):
    engine = Engine(small, slots=16, chunk=10)
    handles = [engine.submit(Request(prompt=[n] * 3, max_tokens=2)) for n in range(5)]
    engine.step()
    assert [len(handle.poll()) for handle in handles] == [1, 1, 1, 0, 0]
    engine.step()
    assert [len(handle.poll()) for handle in handles] == [1, 1, 1, 1, 1]
    assert chunks == [[n] * 3 for n in range(5)]


def test_requests_wait_for_a_slot(small, steps):
    engine = Engine(small, slots=2)
    done = engine.generate([Request(prompt=[n], max_tokens=4) for n in range(5)])
    assert [len(one.tokens) for one in done] == [4] * 5
    assert steps == [2, 2, 2, 2, 2, 2, 1, 1, 1]


def test_the_last_token_costs_no_step(small, steps):
    done = Engine(small).generate([Request(prompt=[1], max_tokens=1)])
    assert len(done[0].tokens) == 1
    assert steps == []


def test_a_step_behind_nothing_is_lost_and_one_step_is_in_vain(small, steps):
    request = Request(prompt=[5, 6], max_tokens=8, seed=3)
    [free] = Engine(small).generate([request])
    assert len(steps) == 7
    engine = Engine(small)
    engine._lag = 1
    [behind] = engine.generate([request])
    assert behind == free
    assert len(steps) == 14
    stop = free.tokens[4]
    ending = Request(prompt=[5, 6], max_tokens=8, seed=3, stop_ids=[stop])
    engine = Engine(small)
    engine._lag = 1
    [stopped] = engine.generate([ending])
    assert stopped.tokens == free.tokens[: free.tokens.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(steps) == 14 + free.tokens.index(stop) + 1


def close(handle: Handle) -> None:
    outputs = iter(handle)
    next(outputs)
    outputs.close()


@pytest.mark.parametrize(
    ("go_away", "given"),
    [
        (close, 1),
        (lambda handle: next(iter(handle)), 1),
        (lambda handle: list(islice(handle, 2)), 2),
        (lambda handle: handle.cancel(), 0),
    ],
    ids=["closed", "dropped", "left", "cancelled"],
)
def test_a_client_that_goes_away_frees_its_slot(small, steps, go_away, given):
    engine = Engine(small, slots=1)
    handle = engine.submit(Request(prompt=[1, 2], max_tokens=1000))
    waiting = engine.submit(Request(prompt=[3], max_tokens=2))
    engine.step()
    assert engine.free_slots == 0
    go_away(handle)
    assert engine.free_slots == 1
    del steps[:]
    assert len(waiting.result().tokens) == 2
    assert steps == [1]
    done = handle.result()
    assert done.finish_reason == "cancelled"
    assert len(done.tokens) == max(given, 1)


def test_a_handle_that_nobody_holds_is_cancelled(small):
    engine = Engine(small, slots=1)
    handle = engine.submit(Request(prompt=[1, 2], max_tokens=1000))
    engine.step()
    del handle
    gc.collect()
    assert engine.free_slots == 1
    assert not engine.step()


def test_cancelling_before_the_prompt_is_read(small, chunks):
    engine = Engine(small, slots=1, chunk=4)
    reading = engine.submit(Request(prompt=[1] * 20))
    waiting = engine.submit(Request(prompt=[2]))
    engine.step()
    reading.cancel()
    waiting.cancel()
    assert not engine.step()
    assert chunks == [[1] * 4]
    for handle in (reading, waiting):
        assert handle.done
        assert handle.result().outputs == []


def test_a_request_after_its_end(small):
    engine = Engine(small)
    handle = engine.submit(Request(prompt=[1], max_tokens=2))
    assert len(list(handle)) == 2
    assert list(handle) == handle.poll() == []
    handle.cancel()
    assert handle.result().finish_reason == "length"
    assert len(handle.result().tokens) == 2


def test_text_and_stop_strings():
    torch.manual_seed(0)
    model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=257))
    engine = Engine(model, tokenizer=BYTES)
    [free] = engine.generate([Request(prompt="ab", max_tokens=40, seed=1, stop_ids=[])])
    assert free.text == bytes(t for t in free.tokens if t < 256).decode(errors="replace")
    stop = free.text[5:7]
    [done] = engine.generate(
        [Request(prompt=b"ab", max_tokens=40, seed=1, stop_ids=[], stop=[stop])]
    )
    assert done.text == free.text[: free.text.index(stop)]
    assert done.finish_reason == "stop"
    assert done.tokens == free.tokens[: len(done.tokens)]


def test_the_separator_of_documents_ends_a_text_unless_the_request_says_otherwise():
    model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=1, vocab_size=257))
    with torch.no_grad():
        model.backbone.norm_f.weight.zero_()  # All logits are 0: greedy takes the first id.
    for separator, reason, count in ((0, "stop", 0), (256, "length", 3)):
        engine = Engine(model, tokenizer=Separated(separator))
        [done] = engine.generate([Request(prompt="x", options=GREEDY, max_tokens=3)])
        assert (done.finish_reason, len(done.tokens)) == (reason, count)
    request = Request(prompt="x", options=GREEDY, max_tokens=3, stop_ids=())
    [done] = Engine(model, tokenizer=Separated(0)).generate([request])
    assert done.text == "\0\0\0"


class Separated:
    """Bytes, with a separator of one's own."""

    vocab_size = 257

    def __init__(self, eos_id: int) -> None:
        self.eos_id = eos_id

    def encode(self, text: str) -> bytes:
        return text.encode()

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(ids)


def test_logprobs(small):
    requests = [
        Request(prompt=[1, 2, 3], max_tokens=5, seed=0, logprobs=count) for count in (None, 0, 2)
    ]
    none, zero, two = Engine(small).generate(requests)
    assert none.tokens == zero.tokens == two.tokens
    assert {output.logprob for output in none.outputs} == {None}
    with torch.no_grad():
        logits, _ = small(torch.tensor([[1, 2, 3, *two.tokens]]))
    logs = logits[0, 2:-1, :50].log_softmax(-1)
    for output, plain, expected in zip(two.outputs, zero.outputs, logs, strict=True):
        assert (
            output.logprob
            == plain.logprob
            == pytest.approx(expected[output.token].item(), abs=1e-5)
        )
        assert plain.likeliest == ()
        ids = [id_ for id_, _ in output.likeliest]
        assert ids == expected.topk(2).indices.tolist()
        assert [value for _, value in output.likeliest] == pytest.approx(
            expected[ids].tolist(), abs=1e-5
        )
    [every] = Engine(small).generate([Request(prompt=[1], max_tokens=1, logprobs=999)])
    assert len(every.outputs[0].likeliest) == 50


def test_sampling_goes_on_where_it_was_cut(small):
    [whole] = Engine(small).generate(
        [Request(prompt=[1, 2], max_tokens=10, seed=9, options=ALL_ON)]
    )
    prompt = [1, 2, *whole.tokens[:4]]
    [rest] = Engine(small).generate([Request(prompt=prompt, max_tokens=6, seed=9, options=ALL_ON)])
    assert rest.tokens == whole.tokens[4:]


def interrupt_after(count: int) -> Callable[[int], None]:
    left = [count]

    def interrupt(size: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    return interrupt


def test_ctrl_c_returns_what_there_is(small, before_steps):
    requests = [Request(prompt=[n], max_tokens=20, seed=n) for n in range(3)]
    whole = Engine(small, slots=2).generate(requests)
    before_steps(interrupt_after(5))
    engine = Engine(small, slots=2)
    done = engine.generate(requests)
    assert [len(one.tokens) for one in done] == [5, 5, 0]
    assert {one.finish_reason for one in done} == {"cancelled"}
    assert [one.tokens for one in done] == [
        one.tokens[:n] for one, n in zip(whole, (5, 5, 0), strict=True)
    ]
    assert engine.free_slots == 2
    assert engine.generate(requests) == whole  # The engine goes on.


def test_stop_from_another_thread_returns_what_there_is(small, before_steps):
    engine = Engine(small, slots=2)
    stopper = threading.Thread(target=engine.stop)

    def stop(size):
        if not stopper.is_alive() and stopper.ident is None:
            stopper.start()

    before_steps(stop)
    done = engine.generate([Request(prompt=[n], max_tokens=10**6) for n in range(3)])
    stopper.join()
    assert {one.finish_reason for one in done} == {"cancelled"}
    assert len(done[0].tokens) >= 1
    assert done[2].tokens == []


def test_what_goes_wrong_ends_every_request_and_the_engine_goes_on(small, monkeypatch):
    requests = [Request(prompt=[n], max_tokens=9, seed=n) for n in range(3)]
    whole = Engine(small).generate(requests)
    engine = Engine(small, slots=2)
    with monkeypatch.context() as context:
        handles = [engine.submit(request) for request in requests]
        engine.step()
        context.setattr(Decoder, "step", _fail)
        with pytest.raises(RuntimeError, match="broken"):
            engine.step()
    for handle in handles:
        with pytest.raises(RuntimeError, match="broken"):
            handle.result()
    with monkeypatch.context() as context:
        context.setattr(small, "prefill", _fail)
        handle = engine.submit(requests[0])
        with pytest.raises(RuntimeError, match="broken"):
            list(handle)
    assert engine.generate(requests) == whole


def _fail(*args: object, **options: object) -> None:
    raise RuntimeError("broken")


def test_logits_that_are_not_finite_end_only_their_request(small):
    broken = MambaLanguageModel(small.config)
    broken.load_state_dict(small.state_dict())
    with torch.no_grad():
        broken.backbone.embedding.weight[7] = float("nan")
    engine = Engine(broken)
    bad, good = (engine.submit(Request(prompt=[n], max_tokens=3, options=GREEDY)) for n in (7, 1))
    with pytest.raises(ArgumentError, match="logits: got NaN or infinite numbers"):
        bad.result()
    assert (
        good.result().tokens
        == alone(small, Request(prompt=[1], max_tokens=3, options=GREEDY), 8)[0]
    )


def in_threads(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.mark.parametrize("background", [False, True])
def test_threads_submit_and_wait(small, background):
    requests = [Request(prompt=[n, 1], max_tokens=8, seed=n) for n in range(6)]
    expected = Engine(small).generate(requests)
    found = [None] * 6
    engine = Engine(small, slots=3, chunk=2)

    def client(number: int) -> None:
        handle = engine.submit(requests[number])
        tokens = [output.token for output in handle]
        found[number] = (tokens, handle.result())

    if background:
        with engine:
            in_threads(6, client)
            in_threads(6, client)
    else:
        in_threads(6, client)
    assert found == [(one.tokens, one) for one in expected]


def test_the_background_thread_outlives_an_error_and_ends_with_the_block(small, monkeypatch):
    request = Request(prompt=[1], max_tokens=5, seed=0)
    [expected] = Engine(small).generate([request])
    engine = Engine(small)
    with engine:
        engine.start()  # Twice is once.
        [thread] = [t for t in threading.enumerate() if t.name == "mambakit-engine"]
        with monkeypatch.context() as context:
            context.setattr(Decoder, "step", _fail)
            handle = engine.submit(request)
            with pytest.raises(RuntimeError, match="broken"):
                handle.result()
        assert engine.submit(request).result() == expected
        endless = engine.submit(Request(prompt=[1], max_tokens=10**9))
    assert not thread.is_alive()
    assert endless.result().finish_reason == "cancelled"
    assert engine.generate([request]) == [expected]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "prompt: got no tokens, wanted at least one"),
        ({"prompt": [50]}, "prompt: got id 50, wanted 0 <= id < 50"),
        ({"prompt": 3}, "prompt: got 3, wanted a list of token ids"),
        ({"prompt": "text"}, "prompt and stop: got text, .* give the engine a tokenizer"),
        ({"prompt": [1], "stop": ["x"]}, "prompt and stop: got text"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(small, chunks, fields, message):
    engine = Engine(small)
    with pytest.raises(ArgumentError, match=message):
        engine.generate([Request(prompt=[1]), Request(**fields)])
    gc.collect()
    assert not engine.step()
    assert chunks == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots: got 0, wanted at least 1"),
        ({"chunk": 0}, "chunk: got 0, wanted at least 1"),
        ({"tokenizer": BYTES}, "tokenizer: has 257 ids, wanted at most 50"),
        ({"slots": 10**12}, "slots: got 1000000000000, but the memory of cpu is enough for [1-9]"),
    ],
)
def test_wrong_options_of_the_engine(small, options, message):
    with pytest.raises(ArgumentError, match=message):
        Engine(small, **options)
