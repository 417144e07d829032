from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambakit.errors import ArgumentError
from mambakit.generate.stopping import TextStream


def pieces(stop: list[str], *data: bytes) -> list[str]:
    stream = TextStream(stop)
    return [*(stream.feed(part) for part in data), stream.finish()]


def test_without_stop_strings_everything_comes_at_once():
    assert pieces([], b"ab", b"c") == ["ab", "c", ""]


def test_half_a_character_waits():
    euro = "€".encode()
    assert pieces([], b"1" + euro[:1], euro[1:2], euro[2:] + b"!") == ["1", "", "€!", ""]
    assert pieces([], b"1" + euro[:2]) == ["1", "�"]
    assert pieces([], b"1", b"\xff", b"2") == ["1", "�", "2", ""]


def test_a_stop_string_across_pieces_is_cut_out_whole():
    stream = TextStream(["END"])
    assert [stream.feed(part) for part in (b"a E", b"N", b"Db")] == ["a ", "", ""]
    assert stream.stopped
    assert stream.feed(b"more") == ""
    assert stream.finish() == ""


def test_a_beginning_that_comes_to_nothing_is_given_back():
    assert pieces(["END"], b"E", b"N", b"T", b"EN") == ["", "", "ENT", "EN"[:0], "EN"]
    assert pieces(["aab"], b"aaa", b"c") == ["a", "aac", ""]


def test_a_stop_string_across_the_bytes_of_a_character():
    stop = "né€"
    data = ("x" + stop + "y").encode()
    stream = TextStream([stop])
    assert "".join(stream.feed(data[i : i + 1]) for i in range(len(data))) == "x"
    assert stream.stopped


def test_the_stop_string_that_is_complete_first_wins():
    for data in ([b"xabc"], [b"xa", b"bc"], [b"x", b"a", b"b", b"c"]):
        assert "".join(pieces(["abc", "b"], *data)) == "xa"
        assert "".join(pieces(["bc", "abc"], *data)) == "x"


@given(
    text=st.text(alphabet="ab€", max_size=30),
    stop=st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 90), max_size=10),
)
def test_cutting_does_not_matter_and_nothing_is_lost(text, stop, cuts):
    data = text.encode()
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    result = "".join(pieces(stop, *(data[a:b] for a, b in pairwise(bounds))))
    ends = [(text.find(s) + len(s), -len(s)) for s in stop if s in text]
    end, minus_length = min(ends, default=(len(text), 0))
    assert result == text[: end + minus_length]


@pytest.mark.parametrize("stop", ["END", [""], ["a", ""]])
def test_wrong_stop_strings(stop):
    with pytest.raises(ArgumentError, match=r"stop: got .*, wanted a list of strings"):
        TextStream(stop)
