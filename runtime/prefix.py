"""KV caches that calls leave behind, for the next one whose prompt begins as one of them does.

A row of a cache depends on the tokens up to its own and on the images among them, whose placeholders all have one id.
So a row's key is the token's id or, where an embedding of an image stands, that image's digest, and what two key lists
have in common from their start is what two calls can share.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .cache import Decoder

Keys = np.ndarray  # uint64 [tokens, 2]: a token's id and 0, or the words of a digest, the second odd


def text_keys(ids: Sequence[int] | np.ndarray) -> Keys:
    """Keys of text tokens."""
    keys = np.zeros((len(ids), 2), np.uint64)
    keys[:, 0] = ids
    return keys


def media_keys(digests: Sequence[bytes], tokens: Sequence[int]) -> Keys:
    """Keys of the embeddings of images and frames, of which each has a digest of 16 bytes and so many tokens."""
    words = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2).copy()
    words[:, 1] |= np.uint64(1)
    return np.repeat(words, tokens, axis=0)


def shared(one: Keys, other: Keys) -> int:
    """How many keys agree from the start."""
    count = min(len(one), len(other))
    apart = np.flatnonzero((one[:count] != other[:count]).any(axis=1))
    return int(apart[0]) if len(apart) else count


@dataclass(slots=True, eq=False)
class HeldCache:
    """A cache's decoder, and one for each of its sequences if they are several; keys of the rows that each holds."""

    decoder: Decoder
    row_decoders: Sequence[Decoder]
    keys: list[Keys] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = self.keys or [text_keys([]) for _ in range(self.decoder.cache.batch)]

    def shares(self, prompts: Sequence[Keys]) -> int:
        """Rows that prompts, one for each sequence, would find done."""
        return sum(map(shared, self.keys, prompts))


class IdleCaches:
    """The caches of calls that have ended, the newest last; at most `kept`, and one that nothing is found in if 0."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self._lock = threading.Lock()
        self._held: list[HeldCache] = []

    def __len__(self) -> int:
        return len(self._held)

    def take(self, batch: int, prompts: Sequence[Keys], make: Callable[[], HeldCache]) -> HeldCache:
        """The cache that shares most with the prompts, if any, or else the oldest of `batch` sequences.

        One is made where none has that many, or where another conversation's would be lost while there is room.
        """
        with self._lock:
            found = self._found(batch, prompts)
            if found is not None:
                self._held.remove(found)
                return found
            while len(self._held) >= max(self.kept, 1):
                self._held.pop(0)  # frees it before a new one is made
        return make()

    def give(self, held: HeldCache) -> None:
        """Keep a cache for later calls."""
        if not self.kept:
            held = HeldCache(held.decoder, held.row_decoders)
        with self._lock:
            self._held = [*self._held, held][-max(self.kept, 1) :]

    def _found(self, batch: int, prompts: Sequence[Keys]) -> HeldCache | None:
        fitting = [held for held in self._held if held.decoder.cache.batch == batch]
        if not fitting:
            return None
        best = max(fitting, key=lambda held: held.shares(prompts))  # the oldest of those that share alike
        lost = sum(map(len, best.keys)) - best.shares(prompts)
        return None if len(self._held) < self.kept and lost > best.shares(prompts) else best
