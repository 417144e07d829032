"""Where the documents lie in a window of tokens.

A token file is one stream: `a1 a2 a3 eos b1 b2 eos ...`. A window takes seqlen + 1 tokens of it, of
which the first seqlen are inputs and the last seqlen targets:

    inputs    a2  a3  eos  b1  b2
    targets   a3  eos b1   b2  eos
    seq_idx   0   0   1    1   1

The separator opens the document that follows it: the state starts afresh there, and learns to
predict a document's first token from the separator alone, which is how text is generated from
nothing. So every token of the stream but the first is a target exactly once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def document_numbers(
    document_ends: npt.NDArray[np.int64], start: int, seqlen: int
) -> npt.NDArray[np.int32]:
    """Number the documents of a window from 0.

    Args:
        document_ends: (documents,) ascending; one past the separator of each document.
        start: First token of the window.
        seqlen: Number of inputs, L.

    Returns:
        seq_idx, (L,).

    Example:
        >>> document_numbers(np.array([4, 7]), start=1, seqlen=5)
        array([0, 0, 1, 1, 1], dtype=int32)
    """
    first, last = np.searchsorted(document_ends, (start + 1, start + seqlen), side="right")
    openings = document_ends[first:last] - (start + 1)
    return np.searchsorted(openings, np.arange(seqlen), side="right").astype(np.int32)
