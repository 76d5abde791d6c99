"""The multiple-choice knapsack: one option of each group, least total cost, total weight within a limit.

The lower convex hulls of the groups give a first answer and, by Lagrange relaxation, a bound (Sinha and Zoltners
1979). Options that the bound excludes are dropped; the rest is searched by lists of undominated sums, one group
after the other (Nemhauser and Ullmann 1969), each sum held against the bound as in Pisinger (1995). Everything that
decides is an integer, so neither rounding nor the order of summation does.

The answer is the optimum unless a list outgrows `states`: then sums of nearly equal cost are merged, and the gap
that this can have cost comes with the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

STATES = 1 << 14  # a model of 120 groups of 6 needs up to 10 thousand


@dataclass(frozen=True, slots=True)
class Options:
    """Undominated options of one group, [n] int64: weights, which have a limit, rise; costs, to be least, fall."""

    weight: np.ndarray
    cost: np.ndarray

    def __getitem__(self, index: np.ndarray) -> "Options":
        return Options(self.weight[index], self.cost[index])

    def plus(self, other: "Options") -> "Options":
        """All sums of one of these and one of those, [m * n]: a run of n, sorted as these are, for each of those."""
        return Options((other.weight[:, None] + self.weight).ravel(), (other.cost[:, None] + self.cost).ravel())

    def undominated(self) -> np.ndarray:
        """Indices of the options that no other beats, weights rising; of equals the first."""
        if not len(self.weight):
            return np.zeros(0, np.int64)
        order = np.argsort(self.weight, kind="stable")  # merges runs, which is what sums come in
        cost = self.cost[order]
        order = order[np.append(True, cost[1:] < np.minimum.accumulate(cost)[:-1])]
        return order[np.append(np.diff(self.weight[order]) > 0, True)]

    def saving(self, i: int, j: int) -> Fraction:
        """Cost saved per weight added, from i to j; exact, for the corners of a frontier hang on it."""
        return Fraction(int(self.cost[i] - self.cost[j]), int(self.weight[j] - self.weight[i]))

    def hull(self) -> list[int]:
        """The options on the lower convex hull, from the lightest."""
        kept: list[int] = []
        for i in range(len(self.weight)):
            while len(kept) > 1 and self.saving(kept[-1], i) >= self.saving(kept[-2], kept[-1]):
                kept.pop()
            kept.append(i)
        return kept


def steps(groups: Sequence[Options]) -> list[tuple[Fraction, int, int]]:
    """Steps along all hulls, most saving first: saving, group, the option it leads to."""
    found = [(group.saving(i, j), k, j) for k, group in enumerate(groups) for i, j in pairwise(group.hull())]
    return sorted(found, key=lambda step: (-step[0], step[1], step[2]))


def minimize(groups: Sequence[Options], limit: int, states: int = STATES) -> tuple[list[int], int]:
    """The options of least total cost (of equals, least weight) within the limit, and the gap to the optimum.

    The lightest options must fit together.
    """
    picked, rate = _greedy(groups, limit)
    if rate is None:
        return picked, 0
    bound = _Bound(groups, limit, rate, _cost(groups, picked))
    found, lost = _search(groups, bound, states)
    if found is None or _cost(groups, found) > bound.first:
        found = picked
    return found, min(lost, _cost(groups, found) - bound.least)


def _cost(groups: Sequence[Options], picked: Sequence[int]) -> int:
    return sum(int(group.cost[i]) for group, i in zip(groups, picked, strict=True))


def _greedy(groups: Sequence[Options], limit: int) -> tuple[list[int], float | None]:
    """Steps of most saving while they fit; and the saving of the first that did not, the best Lagrange multiplier."""
    picked, rate = [0] * len(groups), None
    blocked: set[int] = set()
    room = limit - sum(int(group.weight[0]) for group in groups)
    for saving, k, option in steps(groups):
        added = int(groups[k].weight[option] - groups[k].weight[picked[k]])
        if k in blocked or added > room:
            blocked.add(k)
            rate = float(saving) if rate is None else rate
        else:
            picked[k], room = option, room - added
    return picked, rate


class _Bound:
    """What a sum over some groups can still become: weight over the limit, or cost over an answer that is known.

    With every weight priced at `rate`, an option costs `excess` more than the best of its group, and no answer
    below `first` has more excess in all than first - least.
    """

    def __init__(self, groups: Sequence[Options], limit: int, rate: float, first: int) -> None:
        priced = [group.cost + rate * group.weight for group in groups]
        self.limit, self.rate, self.first = limit, rate, first
        self.best = [float(price.min()) for price in priced]
        # Float64 sums of this size are off by less than this.
        margin = 1 + 1e-12 * (sum(float(abs(price).max()) for price in priced) + rate * limit)
        least = sum(self.best) - rate * limit - margin
        self.least = max(0, int(np.floor(least)))
        self.slack = first - least + margin
        self.options = [np.flatnonzero(price <= price.min() + self.slack) for price in priced]

    def within(self, sums: Options, best: float, lightest: int) -> np.ndarray:
        """Indices of the sums that may become an answer: `best` of their groups, `lightest` of those to come."""
        excess = sums.cost + self.rate * sums.weight - best
        return np.flatnonzero((excess <= self.slack) & (sums.weight <= self.limit - lightest))


def _search(groups: Sequence[Options], bound: _Bound, states: int) -> tuple[list[int] | None, int]:
    """The options of the best answer, or None where merging left nothing as good as the first; and what it can lose."""
    sums, best, lost = Options(np.zeros(1, np.int64), np.zeros(1, np.int64)), 0.0, 0
    lightest = sum(int(group.weight[0]) for group in groups)
    origins = []
    for group, kept, priced in zip(groups, bound.options, bound.best, strict=True):
        best, lightest = best + priced, lightest - int(group.weight[0])
        sums = sums.plus(group[kept])
        index = bound.within(sums, best, lightest)
        index = index[sums[index].undominated()]
        index, merged = _merge(index, sums.cost[index], states)
        sums, lost = sums[index], lost + merged
        origins.append(index)
    return (_trace(origins, bound.options) if len(sums.cost) else None), lost


def _merge(index: np.ndarray, cost: np.ndarray, states: int) -> tuple[np.ndarray, int]:
    """At most `states` of the sums, the lightest in each step of cost, and by how much the costs in one differ."""
    if len(index) <= states:
        return index, 0
    width = -(-int(cost[0] - cost[-1] + 1) // states)
    step = (cost - cost[-1]) // width
    return index[np.concatenate([[True], step[1:] != step[:-1]])], width - 1


def _trace(origins: Sequence[np.ndarray], options: Sequence[np.ndarray]) -> list[int]:
    """The options whose sum is the last of the last list."""
    at, picked = len(origins[-1]) - 1, []
    earlier = [1, *map(len, origins[:-1])]
    for origin, kept, run in zip(reversed(origins), reversed(options), reversed(earlier), strict=True):
        option, at = divmod(int(origin[at]), run)
        picked.append(int(kept[option]))
    return picked[::-1]
