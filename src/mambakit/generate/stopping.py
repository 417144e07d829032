"""Text as it is written, token by token: whole characters only, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from mambakit.errors import ArgumentError


class TextStream:
    """Turns bytes into text that can be shown at once.

    A character is given out when all its bytes are there, and text that may be the beginning of a
    stop string only when it turns out not to be. What comes out does not depend on how the bytes
    are cut: text ends in front of the stop string that is complete first (of several, the longest).

    Args:
        stop: Strings that end the text and are not part of it.

    Attributes:
        stopped: Whether a stop string has come.

    Example:
        >>> stream = TextStream(stop=["end"])
        >>> [stream.feed(piece) for piece in (b"the en", b"try", b" is the e", b"nd.")]
        ['the ', 'entry', ' is the ', '']
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(stop):
            raise ArgumentError(f"stop: got {stop!r}, wanted a list of strings, none of them empty")
        self.stopped = False
        self._stop = list(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes) -> str:
        """Take some bytes; return the text that is certain by now."""
        return self._advance(self._decoder.decode(data))

    def finish(self) -> str:
        """Return what was held back; half a character becomes U+FFFD."""
        text = self._advance(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        ends = [(self._held.find(s) + len(s), -len(s)) for s in self._stop if s in self._held]
        if ends:
            self.stopped = True
            end, minus_length = min(ends)
            certain, self._held = self._held[: end + minus_length], ""
            return certain
        keep = self._length_of_beginning()
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain

    def _length_of_beginning(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0
