from __future__ import annotations

import pytest
import torch

from mambakit.generate import Engine, Request, SamplingOptions, decoding
from mambakit.generate.decoding import Chosen, Decoder, buckets, same_bits
from mambakit.generate.sampling import Method

OPTIONS = [
    SamplingOptions(temperature=0),
    SamplingOptions(),
    SamplingOptions(temperature=0.9, top_k=20, repetition_penalty=1.3),
]


class Graph:
    """Does at each replay what a CUDA graph does: the same step, into the same tensors."""

    def __init__(self, decoder: Decoder, bucket: int, method: Method, replayed: list) -> None:
        self._step = lambda: decoder._step(bucket, method)
        self._replayed, self._key = replayed, (bucket, method)
        vocab_size = decoder._vocab_size
        self.chosen = Chosen(
            torch.zeros(bucket, dtype=torch.int64), torch.zeros(bucket, vocab_size)
        )

    def replay(self) -> None:
        self._replayed.append(self._key)
        for static, new in zip(self.chosen, self._step(), strict=True):
            static.copy_(new)


@pytest.mark.parametrize("slots", [1, 3, 6])
def test_graphs_of_more_rows_than_are_taken_change_nothing(small, slots):
    requests = [
        Request(prompt=[n, 1], options=OPTIONS[n % 3], max_tokens=3 + n, seed=n, stop_ids=[5])
        for n in range(8)
    ]
    expected = Engine(small, slots=slots).generate(requests)
    engine, replayed = Engine(small, slots=slots), []
    decoder = engine._decoder
    for bucket in decoder._buckets:
        for method in Method:
            graph = Graph(decoder, bucket, method, replayed)
            decoder._graphs[bucket, method] = graph, graph.chosen
    assert engine.generate(requests) == expected
    assert {bucket for bucket, _ in replayed} == set(decoder._buckets)
    assert {method for _, method in replayed} >= {Method.DRAW, Method.CUT}


def test_a_batch_is_filled_up_to_one_that_gives_the_same_bits(small, monkeypatch):
    monkeypatch.setattr(decoding, "gives_same_bits", lambda _, __, size, last: size > 3)
    requests = [
        Request(prompt=[n, 1], options=OPTIONS[n % 3], max_tokens=3 + n, seed=n) for n in range(6)
    ]
    expected = Engine(small, slots=12).generate(requests)
    engine = Engine(small, slots=12)
    engine._decoder = Decoder(small, 12, graphs=False, batch_invariant=True)
    assert engine._decoder._buckets == [4, 8, 12]
    stepped, step = [], engine._decoder._step
    monkeypatch.setattr(
        engine._decoder,
        "_step",
        lambda count, method: (stepped.append(count), step(count, method))[1],
    )
    assert engine.generate(requests) == expected
    assert set(stepped) == {4, 8}


def test_on_a_cpu_all_batches_give_the_same_bits(small):
    sizes = buckets(20)
    assert same_bits(small, small.initial_state(20), sizes) == sizes
