"""States after beginnings of prompts, so that what several prompts have in common is read once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping, Sequence

from torch import Tensor

from mambakit.errors import ArgumentError
from mambakit.generate.prefix import Prefix, state_bytes
from mambakit.models.state import ModelState


class PrefixCache(MutableMapping[str, Prefix]):
    """Keeps states within a bound of memory.

    As a mapping it holds prefixes under names, until they are deleted. Besides these, an engine
    that was given the cache leaves states in it by itself, and looks for the longest one that fits
    each prompt; of those, the ones that were used longest ago make room.

    The engine's own states stand after whole chunks of a prompt, so that a prompt continues from one
    with the same sums as if it had been read from the beginning: the result is the same. They
    are found by a digest of the tokens.

    Args:
        max_bytes: Most memory for all states together. The state of one prompt takes the same,
            however long the prompt is.

    Example:
        >>> from mambakit import MambaConfig, MambaLanguageModel
        >>> from mambakit.generate import Engine, Request
        >>> model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=8))
        >>> engine = Engine(model, chunk=4, prefix_cache=PrefixCache(10_000_000))
        >>> [done] = engine.generate([Request(prompt=[1, 2, 3, 4, 5])])
        >>> [done] = engine.generate([Request(prompt=[1, 2, 3, 4, 6])])
        >>> done.reused_tokens
        4
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ArgumentError(f"max_bytes: got {max_bytes}, wanted at least 1")
        self.max_bytes = max_bytes
        self._named: dict[str, Prefix] = {}
        self._states: OrderedDict[bytes, ModelState] = OrderedDict()
        self._state_bytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of everything it holds."""
        return self._state_bytes + sum(prefix.nbytes for prefix in self._named.values())

    @property
    def states(self) -> int:
        """How many states engines have left in it."""
        return len(self._states)

    def keep(self, key: bytes, state: ModelState) -> None:
        """Keep a state as the one used last, unless it alone is too large.

        Args:
            key: See `prefix_keys`.
            state: Nothing may change it any more.
        """
        with self._lock:
            if key in self._states:
                self._states.move_to_end(key)
            else:
                self._states[key] = state
                self._state_bytes += state_bytes(state)
                self._make_room()

    def find(self, keys: Sequence[bytes]) -> tuple[int, ModelState] | None:
        """The longest beginning that is known: its place among the keys, and its state."""
        with self._lock:
            for index in reversed(range(len(keys))):
                if keys[index] in self._states:
                    self._states.move_to_end(keys[index])
                    return index, self._states[keys[index]]
        return None

    def __getitem__(self, name: str) -> Prefix:
        if name not in self._named:
            names = ", ".join(self._named) or "none"
            raise KeyError(f"prefix {name!r} is not in the cache; there are: {names}")
        return self._named[name]

    def __setitem__(self, name: str, prefix: Prefix) -> None:
        with self._lock:
            others = (other.nbytes for known, other in self._named.items() if known != name)
            needed = prefix.nbytes + sum(others)
            if needed > self.max_bytes:
                raise ArgumentError(
                    f"prefix {name!r}: with it the named ones take {needed} bytes, wanted at most "
                    f"the {self.max_bytes} of max_bytes; delete others or raise max_bytes"
                )
            self._named[name] = prefix
            self._make_room()

    def __delitem__(self, name: str) -> None:
        with self._lock:
            del self._named[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def _make_room(self) -> None:
        while self.nbytes > self.max_bytes and self._states:
            _, state = self._states.popitem(last=False)
            self._state_bytes -= state_bytes(state)


def prefix_keys(mark: str, prompt: Tensor, chunk: int) -> list[bytes]:
    """A digest of each beginning of a prompt that is a whole number of chunks.

    Args:
        mark: Fingerprint of the model.
        prompt: Token ids, (L,), int64.
        chunk: Tokens read at once.
    """
    digest = hashlib.sha256(f"{mark} {chunk} ".encode())
    found = []
    tokens = prompt.numpy()
    for first in range(0, len(tokens) - chunk + 1, chunk):
        digest.update(tokens[first : first + chunk].tobytes())
        found.append(digest.digest())
    return found


def is_kept(chunks: int, whole: int) -> bool:
    """Whether the state after so many chunks, of a prompt that has `whole` of them, is worth keeping.

    The last one, and those after 1, 2, 4, ... chunks: prompts that part somewhere share at least half
    of what they have in common, and a prompt of a million tokens does not fill the cache.
    """
    return chunks == whole or chunks & (chunks - 1) == 0
