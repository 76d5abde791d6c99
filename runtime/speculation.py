"""Speculative decoding by prompt lookup: drafts are what followed the newest tokens where they last stood in the text.

Answers about documents repeat their prompt and themselves: names, numbers, the keys of a table. What followed then is
drafted, one decoder call takes the newest token and the draft, and each row of its logits is sampled in turn for as
long as the token it gives is the one that was drafted (LLMA, arXiv:2304.04487).

Sampling a row as ever and comparing is the rejection sampling of arXiv:2211.17192 for a draft that is certain of its
token: the draft d is kept with probability p(d), and what comes in its place has the distribution p without d,
normalised. The same random numbers are drawn for the same tokens, so that a seed gives the same answer with drafts and
without. What may differ is the last bit of a logit, where an engine's kernels for one row and for several round apart.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from statistics import median_low
from typing import NamedTuple

import numpy as np

_LONGEST, _SHORTEST = 8, 2  # tokens that must match; of longer matches more comes true
# Tokens of a verifying call, shorter drafts padded: few sizes, so that the time of each is known, and none of 2 or 3.
# ONNX Runtime 1.25 takes 64 ms for 2 rows where 1 takes 25, 4 take 30 and 16 take 41 (FP32, 2 cores).
_SIZES = (4, 8, 16)
_TIMED = 7  # calls of a size whose median time counts: other work on the machine comes and goes
_MEMORY = 6.0  # verified tokens that the chance of the next is judged by
_CREDIT = 2.0  # the most decode steps that drafts may lose before they have won any
_ALLOWANCE = 0.01  # of a step's time, earned by each step for drafts that may fail


class Match(NamedTuple):
    """Where the newest tokens stood before: how many agree, and the place of what followed."""

    length: int
    place: int


class Lookup:
    """The ids of one sequence, prompt and answer, and where their newest stood before.

    prompt_ids: int64 [tokens]. limit: tokens that the answer may have. never: ids that are no draft.
    """

    def __init__(self, prompt_ids: np.ndarray, limit: int, never: Collection[int]) -> None:
        self._ids = np.empty(len(prompt_ids) + limit, np.int64)
        self._ids[: len(prompt_ids)] = prompt_ids
        self._count, self._never = len(prompt_ids), never

    def push(self, token_id: int) -> None:
        """Append a token of the answer."""
        self._ids[self._count] = token_id
        self._count += 1

    def match(self) -> Match | None:
        """The longest match of the newest tokens, the last of several. 10 us for 4,096 ids."""
        ids, newest = self._ids[: self._count], self._count - 1
        places = np.flatnonzero(ids[:newest] == ids[newest]) + 1  # behind a token that is the newest
        length = 1 if len(places) else 0
        while 0 < length < min(_LONGEST, self._count):
            longer = places[places > length]
            longer = longer[ids[longer - 1 - length] == ids[newest - length]]
            if not len(longer):
                break
            places, length = longer, length + 1
        return Match(length, int(places[-1])) if length >= _SHORTEST else None

    def draft(self, match: Match, count: int) -> list[int]:
        """At most `count` tokens that followed; where the text ends, its last period goes on."""
        period = self._count - match.place
        tokens = self._ids[match.place + np.arange(count) % period].tolist()
        end = next((i for i, token in enumerate(tokens) if token in self._never), count)
        return tokens[:end]


class Drafting:
    """When drafts pay, learned from calls of one batch size: their times, and how many drafted tokens were right.

    A draft is verified where the tokens expected of it are worth its call's time, measured in plain steps. What drafts
    may lose is bounded whatever the text: 2 steps, and 1 % of the steps since; what they win pays back.
    """

    def __init__(self) -> None:
        self._steps = deque[float](maxlen=_TIMED)  # seconds of plain ones
        self._calls = defaultdict[int, deque[float]](lambda: deque(maxlen=_TIMED))  # in plain steps, by their tokens
        # Tokens that were right, of those that were verified, by the length of the match. At first as texts have them:
        # 0.42 of drafts by 2 tokens, 0.68 by 4 and 0.87 by 8 in prose, 0.50, 0.70 and 0.81 in code, more in tables.
        self._right = {n: (2 * n / (n + 2), 2.0) for n in range(_SHORTEST, _LONGEST + 1)}
        self._credit = _CREDIT

    def size(self, matches: Sequence[Match], sequences: int, most: int) -> int:
        """Tokens of the next call of `sequences`, some of which have a match; at most `most`. 1: without drafts."""
        sizes = [size for size in _SIZES if size <= most] if matches and self._steps else []
        if not sizes or self._credit <= 0:
            return 1
        gain, best = max((self._gain(matches, sequences, size), size) for size in sizes)
        # Where it is not expected to pay: now and then, to see whether it does.
        return best if gain > 0 or self._credit >= max(_CREDIT / 2, -gain) else 1

    def stepped(self, seconds: float) -> None:
        """Learn from a call without drafts."""
        self._steps.append(seconds)
        self._credit = min(self._credit + _ALLOWANCE, _CREDIT)

    def verified(self, size: int, seconds: float, sequences: int, outcomes: Sequence[tuple[Match, int, int]]) -> None:
        """Learn from a call of `size` tokens. outcomes: drafts by their match, tokens right and tokens looked at."""
        if not self._steps:
            return
        self._calls[size].append(seconds / median_low(self._steps))
        for match, right, tried in outcomes:
            if tried:
                self._right[match.length] = _remembered(*self._right[match.length], right, tried)
        won = sum(right for _, right, _ in outcomes) / sequences + 1 - self._cost(size)
        self._credit = min(self._credit + won, _CREDIT)

    def _gain(self, matches: Sequence[Match], sequences: int, size: int) -> float:
        """Plain steps that a call of `size` tokens is expected to save."""
        chances = [right / tried for right, tried in (self._right[match.length] for match in matches)]
        expected = sum(sum(p**i for i in range(1, size)) for p in chances)
        return expected / sequences + 1 - self._cost(size)

    def _cost(self, size: int) -> float:
        """In plain steps: as measured, or hoped where it was not yet."""
        return median_low(calls) if (calls := self._calls[size]) else 1 + size / 64


def _remembered(rights: float, trials: float, right: int, tried: int) -> tuple[float, float]:
    """Counts after some more, older ones fading."""
    rights, trials = rights + right, trials + tried
    return rights * min(1, _MEMORY / trials), min(trials, _MEMORY)
