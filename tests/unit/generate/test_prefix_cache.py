from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambakit.errors import ArgumentError
from mambakit.generate import Engine, Prefix, PrefixCache, Request
from mambakit.generate.prefix import state_bytes
from mambakit.generate.prefix_cache import is_kept, prefix_keys

CHUNK = 4


@pytest.fixture(scope="module")
def size(small) -> int:
    return state_bytes(small.initial_state(1))


def requests(*prompts: list[int]) -> list[Request]:
    return [Request(prompt=prompt, max_tokens=4, seed=0, logprobs=1) for prompt in prompts]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_reuse_changes_nothing_bit_for_bit(small, size, data):
    stem = data.draw(st.lists(st.integers(0, 49), min_size=1, max_size=30))
    ends = st.tuples(
        st.integers(0, len(stem)), st.lists(st.integers(0, 49), min_size=1, max_size=9)
    )
    prompts = [
        [*stem[:cut], *rest] for cut, rest in data.draw(st.lists(ends, min_size=1, max_size=5))
    ]
    cache = PrefixCache(data.draw(st.integers(1, 8)) * size)
    engine = Engine(small, slots=2, chunk=CHUNK, prefix_cache=cache)
    plain = Engine(small, slots=2, chunk=CHUNK)
    for one, two in zip(prompts, prompts[::-1], strict=True):
        found, expected = engine.generate(requests(one, two)), plain.generate(requests(one, two))
        assert [done.outputs for done in found] == [done.outputs for done in expected]
        assert all(done.reused_tokens % CHUNK == 0 for done in found)
        assert cache.nbytes <= cache.max_bytes


def test_the_longest_known_beginning_is_taken(small, size):
    cache = PrefixCache(100 * size)
    engine = Engine(small, chunk=CHUNK, prefix_cache=cache)
    stem = list(range(16))

    def reused(prompt: list[int]) -> int:
        [done] = engine.generate(requests(prompt))
        return done.reused_tokens

    assert reused([*stem, 1]) == 0
    assert cache.states == 3  # after 4, 8 and 16 tokens
    assert reused([*stem, 2]) == 16
    assert reused([*stem, 1]) == 16
    assert reused(stem) == 8  # the last token is read in any case
    assert reused([*stem[:9], 40, 41, 42]) == 8
    assert reused([*stem[:3], 40, 41, 42]) == 0
    assert reused([40, *stem]) == 0
    assert reused(stem[:4]) == 0
    other = Engine(small, chunk=2, prefix_cache=cache)
    assert other.generate(requests([*stem, 1]))[0].reused_tokens == 0


def test_what_is_read_already_is_not_read_again(small, size, monkeypatch):
    read, prefill = [], small.prefill

    def recorded(tokens, state=None, **options):
        read.append(tokens[0].tolist())
        return prefill(tokens, state, **options)

    monkeypatch.setattr(small, "prefill", recorded)
    engine = Engine(small, chunk=CHUNK, prefix_cache=PrefixCache(9 * size))
    engine.generate(requests([1, 2, 3, 4, 5, 6]))
    engine.generate(requests([1, 2, 3, 4, 7]))
    assert read == [[1, 2, 3, 4], [5, 6], [7]]


def test_other_weights_find_nothing(small, size):
    cache = PrefixCache(100 * size)
    Engine(small, chunk=CHUNK, prefix_cache=cache).generate(requests([1] * 9))
    torch.manual_seed(5)
    other = type(small)(small.config)
    [done] = Engine(other, chunk=CHUNK, prefix_cache=cache).generate(requests([1] * 9))
    assert done.reused_tokens == 0


def test_what_was_used_longest_ago_makes_room(small, size):
    cache = PrefixCache(2 * size + 10)
    state = small.initial_state(1)
    cache.keep(b"a", state)
    cache.keep(b"b", state)
    assert cache.find([b"a"]) == (0, state)
    cache.keep(b"c", state)
    assert cache.find([b"b"]) is None
    assert cache.find([b"a", b"x", b"c", b"y"]) == (2, state)
    cache.keep(b"c", state)
    assert (cache.states, cache.nbytes) == (2, 2 * size)
    small_cache = PrefixCache(size - 1)
    small_cache.keep(b"a", state)
    assert (small_cache.states, small_cache.nbytes) == (0, 0)


def test_named_prefixes_stay(small, size):
    cache = PrefixCache(3 * size)
    prefix, other = Prefix.read(small, [1, 2, 3]), Prefix.read(small, [4])
    for key in (b"a", b"b", b"c"):
        cache.keep(key, small.initial_state(1))
    cache["system"] = prefix
    assert cache.states == 1
    assert cache["system"] is prefix
    assert dict(cache) == {"system": prefix}
    cache["system"] = other
    cache["more"] = prefix
    assert (cache.states, len(cache)) == (0, 2)
    assert cache.nbytes == prefix.nbytes + other.nbytes
    with pytest.raises(
        ArgumentError, match=r"prefix 'third': with it the named ones take \d+ bytes"
    ):
        cache["third"] = other
    with pytest.raises(
        KeyError, match="prefix 'third' is not in the cache; there are: system, more"
    ):
        cache["third"]
    del cache["system"]
    assert list(cache) == ["more"]
    [done] = Engine(small, prefix_cache=cache).generate(
        [Request(prompt=[1], prefix=cache["more"], max_tokens=1)]
    )
    assert done.reused_tokens == 0
    assert cache.states == 0


def test_keys_stand_for_whole_chunks_of_the_same_tokens_and_model():
    prompt = torch.arange(10)
    keys = prefix_keys("model", prompt, 4)
    assert len(set(keys)) == 2
    assert prefix_keys("model", prompt[:8], 4) == keys
    assert prefix_keys("model", prompt[:7], 4) == keys[:1]
    assert prefix_keys("model", prompt[:3], 4) == []
    changed = prompt.clone()
    changed[0] += 1
    for others in (
        prefix_keys("other", prompt, 4),
        prefix_keys("model", changed, 4),
        prefix_keys("model", prompt, 2),
    ):
        assert not set(others) & set(keys)


def test_few_states_of_a_long_prompt_are_kept():
    kept = [chunks for chunks in range(1, 2001) if is_kept(chunks, 2000)]
    assert kept == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2000]


def test_wrong_bound():
    with pytest.raises(ArgumentError, match="max_bytes: got 0, wanted at least 1"):
        PrefixCache(0)
