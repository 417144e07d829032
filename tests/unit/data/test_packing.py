from __future__ import annotations

import numpy as np

from mambakit.data.packing import document_numbers

#    position  0   1   2   3    4   5   6    7   8
#    token     a   a   a   eos  b   b   eos  c   eos
ENDS = np.array([4, 7, 9])


def test_a_separator_opens_the_document_after_it() -> None:
    assert document_numbers(ENDS, start=0, seqlen=8).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_numbers_start_at_zero_in_every_window() -> None:
    assert document_numbers(ENDS, start=3, seqlen=5).tolist() == [0, 0, 0, 1, 1]
    assert document_numbers(ENDS, start=4, seqlen=3).tolist() == [0, 0, 1]
    assert document_numbers(ENDS, start=1, seqlen=2).tolist() == [0, 0]


def test_documents_of_only_a_separator_count() -> None:
    assert document_numbers(np.array([1, 2, 3, 5]), start=0, seqlen=4).tolist() == [0, 1, 2, 2]
