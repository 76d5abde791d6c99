"""Which precision each group of modules gets: the least divergence within a size, the least size within a divergence.

The model is additive, as in the integer programs of Hubara et al. (2021) and HAWQ-V3 (Yao et al. 2021): what the
groups cost when they are quantised one at a time adds up. Choosing is then a multiple-choice knapsack (knapsack.py).
Divergences are counted in whole units of 1e-12 nats, so sums are exact and no answer is over its budget.

Answers are optimal, for random models of 120 groups of 6 choices in some ten milliseconds. Where every saving has the
same price per byte, which no measurement gives, an allocation carries a proven gap instead.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np

from ..errors import OneVisionError
from .knapsack import Options, minimize, steps

_UNIT = 10**12  # parts of a nat that divergences are counted in
_LARGEST_DIVERGENCE = 1000  # nats of one choice; guessing among 152 thousand tokens is 12 away from knowing
_LARGEST_BYTES = 10**15  # of one choice: sums of thousands of groups fit int64


@dataclass(frozen=True, slots=True)
class Choice:
    """One precision of one group: the bytes it takes, and the divergence (nats, >= 0) when only it has it."""

    group: str
    precision: str
    bytes: int
    divergence: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """A precision for every group, with the bytes and the predicted divergence (nats) of all of them.

    gap: how far from the optimum it can be at most, in what was minimised (nats or bytes); 0 if it is the optimum.
    """

    chosen: Mapping[str, str]
    bytes: int
    divergence: float
    gap: float = 0.0


def smallest_divergence(choices: Sequence[Choice], budget_bytes: int) -> Allocation:
    """The allocation of least predicted divergence that takes at most `budget_bytes`; of equals, the smallest.

    Raises OneVisionError where nothing fits, with the smallest size there is.
    """
    groups = _groups(choices)
    smallest = sum(group[0].bytes for group in groups)
    if smallest > budget_bytes:
        raise OneVisionError(
            f"the smallest precisions together take {smallest:,} bytes, more than the budget of {budget_bytes:,}: "
            f"raise the budget to {smallest:,} or more, or allow smaller precisions"
        )
    picked, gap = minimize([_by_size(group) for group in groups], math.floor(budget_bytes))
    return _allocation(choices, [group[i] for group, i in zip(groups, picked, strict=True)], gap / _UNIT)


def smallest_size(choices: Sequence[Choice], budget_divergence: float) -> Allocation:
    """The smallest allocation whose predicted divergence is at most `budget_divergence` nats; of equals, the closest.

    Raises OneVisionError where nothing is that close, with the least divergence there is.
    """
    groups = _groups(choices)
    least, budget = sum(_units(group[-1]) for group in groups), _floor_units(budget_divergence)
    if least > budget:
        raise OneVisionError(
            f"the best precisions together diverge by {least / _UNIT} nats, more than the budget of "
            f"{budget_divergence}: raise the budget to {least / _UNIT} or more, or allow better precisions"
        )
    picked, gap = minimize([_by_divergence(group) for group in groups], budget)
    return _allocation(choices, [group[::-1][i] for group, i in zip(groups, picked, strict=True)], float(gap))


def frontier(choices: Sequence[Choice], points: int = 200) -> list[Allocation]:
    """Allocations from the smallest to the closest; none that exists is both smaller and closer than one of them.

    It holds every corner of the lower convex hull, however many there are, and the ends. Between them the widest
    gaps in size are filled until there are `points`, or nothing is missing, or (as above) certainty takes too long.
    """
    found = {allocation.bytes: allocation for allocation in _supported(choices)}
    sizes = sorted(found)
    gaps = [(left - right, left, right) for left, right in pairwise(sizes)]
    heapify(gaps)
    while gaps and len(found) < points:
        _, left, right = heappop(gaps)
        middle = _between(choices, found[left], found[right])
        if middle.gap:
            break  # not certain to lie on the frontier, and the others would take as long
        if middle.bytes not in found:
            found[middle.bytes] = middle
            for low, high in ((left, middle.bytes), (middle.bytes, right)):
                heappush(gaps, (low - high, low, high))
    return [found[size] for size in sorted(found)]


def undominated(choices: Sequence[Choice]) -> list[Choice]:
    """Choices that no other beats in size and divergence, from smallest to closest; of equals, the first name."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bytes, _units(c), c.precision)):
        if not kept or _units(choice) < _units(kept[-1]):
            kept.append(choice)
    return kept


def by_group(choices: Sequence[Choice]) -> dict[str, list[Choice]]:
    """The choices of each group, in the order given.

    Raises OneVisionError for no choices, one given twice, and numbers that no measurement gives.
    """
    groups: dict[str, list[Choice]] = {}
    for choice in choices:
        where = f"{choice.group} in {choice.precision}"
        if not 0 <= choice.divergence <= _LARGEST_DIVERGENCE:
            raise OneVisionError(
                f"{where}: a divergence of {choice.divergence} nats is not between 0 and {_LARGEST_DIVERGENCE}: "
                f"measure it again, or leave the choice out"
            )
        if not 0 <= choice.bytes <= _LARGEST_BYTES:
            raise OneVisionError(f"{where}: {choice.bytes} bytes is not a size: give what the group takes when stored")
        same = groups.setdefault(choice.group, [])
        if any(other.precision == choice.precision for other in same):
            raise OneVisionError(f"{where} is given twice: give each precision of a group once")
        same.append(choice)
    if not groups:
        raise OneVisionError("there are no choices to allocate: measure at least one precision of one group")
    return groups


def _groups(choices: Sequence[Choice]) -> list[list[Choice]]:
    """Undominated choices by group, in an order that does not depend on the order given."""
    return [undominated(group) for _, group in sorted(by_group(choices).items())]


def _units(choice: Choice) -> int:
    return round(choice.divergence * _UNIT)


def _floor_units(divergence: float) -> int:
    """A budget as it is written in decimal, so that three times 0.1 fit 0.3."""
    if math.isnan(divergence):
        raise OneVisionError("the budget of divergence is not a number: give it in nats, as in 0.05")
    return math.floor(Decimal(repr(min(max(float(divergence), -1.0), 1e6))) * _UNIT)


def _allocation(choices: Sequence[Choice], picked: Sequence[Choice], gap: float = 0.0) -> Allocation:
    precision = {choice.group: choice.precision for choice in picked}
    return Allocation(
        {choice.group: precision[choice.group] for choice in choices},
        sum(choice.bytes for choice in picked),
        sum(map(_units, picked)) / _UNIT,
        gap,
    )


def _by_size(group: Sequence[Choice]) -> Options:
    return Options(np.array([c.bytes for c in group], np.int64), np.array([*map(_units, group)], np.int64))


def _by_divergence(group: Sequence[Choice]) -> Options:
    options = _by_size(group)
    return Options(options.cost[::-1], options.weight[::-1])


def _supported(choices: Sequence[Choice]) -> Iterator[Allocation]:
    """The corners of the lower convex hull, and what lies on its edges on the way from one to the next."""
    groups = _groups(choices)
    picked = [group[0] for group in groups]
    yield _allocation(choices, picked)
    for _, k, option in steps([_by_size(group) for group in groups]):
        picked[k] = groups[k][option]
        yield _allocation(choices, picked)


def _between(choices: Sequence[Choice], left: Allocation, right: Allocation) -> Allocation:
    """The best in the lower half of the sizes between two or, if that is the left one, the next after it."""
    middle = smallest_divergence(choices, (left.bytes + right.bytes) // 2)
    if middle.bytes == left.bytes:
        middle = smallest_size(choices, (round(left.divergence * _UNIT) - 1) / _UNIT)
    return middle
