"""Rows of one static KV cache that sequences take and leave while others go on.

A slot keeps what its last sequence wrote, so that a prompt that begins as that one did starts behind what they share.
"""

import numpy as np

from ..errors import OneVisionError
from .cache import Decoder
from .generation import Running
from .model import Model
from .prefix import shared, text_keys


class Slots:
    """`count` sequences at most, each in a row of the cache."""

    def __init__(self, model: Model, count: int) -> None:
        self.count, self.table = count, model.table
        self._cache = model.new_cache(count)
        self._graph, self._vocabulary = model.graphs["decoder"], model.config.text.vocab_size
        self._rows = min(self._cache.max_length, self._graph.rows or self._cache.max_length)
        self._decoders: dict[tuple[int, int], Decoder] = {}
        self._keys = [text_keys([]) for _ in range(count)]  # of what idle slots hold
        self._used = [0] * count  # when they were taken last
        self._clock = 0
        self.sequences: dict[int, Running] = {}

    def take(self, sequence: Running) -> int | None:
        """A free slot: one that shares more with the prompt than it would lose, or else the one used least recently.

        None if all are taken.
        """
        free = [i for i in range(self.count) if i not in self.sequences]
        if not free:
            return None
        same = {i: shared(self._keys[i], sequence.prompt.keys) for i in free}
        slot = max(free, key=lambda i: (max(2 * same[i] - len(self._keys[i]), 0), -self._used[i], -i))
        self._clock += 1
        self._used[slot] = self._clock
        sequence.reused = min(same[slot], len(sequence.prompt.ids) - 1)
        sequence.cached = sequence.reused
        self.sequences[slot] = sequence
        return slot

    def leave(self, slot: int) -> None:
        """The slot's sequence is done; what it wrote stays until another takes the slot."""
        self._keys[slot] = self.sequences.pop(slot).keys()

    def prefill(self, slot: int, tokens: int) -> bool:
        """At most so many more tokens of a prompt; whether that was its end, and the first token was chosen."""
        sequence = self.sequences[slot]
        embeds, start = sequence.prompt.embeds, sequence.cached
        part = embeds[start : start + min(tokens, self._graph.tokens_per_call or tokens)]
        last = np.array([[len(part) - 1]])
        logits = self._decoder(slot, slot + 1)(part.reshape((1, *part.shape)), np.array([start]), last)
        sequence.cached = start + len(part)
        if sequence.cached < len(embeds):
            return False
        _choose(sequence, logits[0, 0])
        return True

    def decode(self, slots: list[int]) -> None:
        """One more token for each of some slots, in one call; those between them write behind what they hold."""
        first, last = min(slots), max(slots) + 1
        tokens, starts = np.zeros((last - first, 1), np.int64), np.zeros(last - first, np.int64)
        for i in range(first, last):
            if i in slots:
                tokens[i - first], starts[i - first] = self.sequences[i].last, self.sequences[i].position
            else:
                starts[i - first] = self._behind(i)
        logits = self._decoder(first, last)(self.table[tokens], starts, np.zeros_like(tokens))
        for i in slots:
            sequence = self.sequences[i]
            sequence.cached += 1
            _choose(sequence, logits[i - first, 0])

    def _behind(self, slot: int) -> int:
        """The first row of a slot that holds nothing; the last one, given up, where all hold something."""
        if slot in self.sequences:
            return min(self.sequences[slot].cached, self._rows - 1)
        self._keys[slot] = self._keys[slot][: self._rows - 1]
        return len(self._keys[slot])

    def _decoder(self, first: int, last: int) -> Decoder:
        """The decoder of some neighbouring slots, made when first asked for."""
        if (first, last) not in self._decoders:
            self._decoders[first, last] = Decoder(self._graph, self._cache.rows(first, last), self._vocabulary)
        return self._decoders[first, last]


def _choose(sequence: Running, logits: np.ndarray) -> None:
    """The next token. A sequence that has none, as where its grammar became too complex, ends alone."""
    try:
        sequence.accept(sequence.sampler.sample(logits))
    except OneVisionError as error:
        sequence.fault, sequence.finish_reason = error, "fault"
