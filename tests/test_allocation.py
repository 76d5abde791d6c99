"""Allocations against every allocation there is, in exact arithmetic; and large models, with their gaps and times."""

import time
from collections.abc import Sequence
from decimal import Decimal
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onevision_edge.calibration.allocation import (
    Allocation,
    Choice,
    frontier,
    smallest_divergence,
    smallest_size,
    undominated,
)
from onevision_edge.calibration.knapsack import Options, _greedy, _merge, minimize
from onevision_edge.errors import OneVisionError

NAT = 10**12
Sums = tuple[int, Decimal]  # bytes, nats


def make(*groups: Sequence[tuple[int, float]]) -> list[Choice]:
    return [Choice(f"g{k}", f"p{i}", *pair) for k, group in enumerate(groups) for i, pair in enumerate(group)]


def decimal(value: float) -> Decimal:
    return Decimal(repr(value))


def everything(choices: Sequence[Choice]) -> list[Sums]:
    groups: dict[str, list[Choice]] = {}
    for choice in choices:
        groups.setdefault(choice.group, []).append(choice)
    return [(sum(c.bytes for c in p), sum(decimal(c.divergence) for c in p)) for p in product(*groups.values())]


def undominated_sums(sums: Sequence[Sums]) -> list[Sums]:
    kept: list[Sums] = []
    for pair in sorted(sums):
        if not kept or pair[1] < kept[-1][1]:
            kept.append(pair)
    return kept


def assert_consistent(choices: Sequence[Choice], allocation: Allocation) -> None:
    """It names one choice of each group, in the order given, and sums them."""
    named = {(c.group, c.precision): c for c in choices}
    picked = [named[item] for item in allocation.chosen.items()]
    assert list(allocation.chosen) == list(dict.fromkeys(c.group for c in choices))
    assert allocation.bytes == sum(c.bytes for c in picked)
    assert decimal(allocation.divergence) == sum(decimal(c.divergence) for c in picked)


# Few values, so that ties and dominated choices abound; and many, with no structure.
few = st.tuples(st.integers(0, 6), st.integers(0, 6).map(lambda n: n / 10))
many = st.tuples(st.integers(0, 10**10), st.integers(0, 2 * NAT).map(lambda n: n / NAT))
instances = st.one_of(
    st.lists(st.lists(pair, min_size=1, max_size=5), min_size=1, max_size=5).map(lambda groups: make(*groups))
    for pair in (few, many)
)
fractions = st.integers(0, 64).map(lambda n: n / 64)


def at(fraction: float, values: Sequence[int | Decimal]) -> int:
    low, high = min(values), max(values)
    return int(low + (high - low) * Decimal(fraction))


@settings(max_examples=200, deadline=None)
@given(instances, fractions)
def test_the_least_divergence_within_a_size(choices: list[Choice], fraction: float) -> None:
    sums = everything(choices)
    budget = at(fraction, [size for size, _ in sums])
    allocation = smallest_divergence(choices, budget)
    divergence, size = min((divergence, size) for size, divergence in sums if size <= budget)
    assert (allocation.bytes, decimal(allocation.divergence), allocation.gap) == (size, divergence, 0)
    assert_consistent(choices, allocation)


@settings(max_examples=200, deadline=None)
@given(instances, fractions)
def test_the_least_size_within_a_divergence(choices: list[Choice], fraction: float) -> None:
    sums = everything(choices)
    budget = at(fraction, [NAT * divergence for _, divergence in sums]) / NAT
    allocation = smallest_size(choices, budget)
    assert allocation.divergence <= budget
    size, divergence = min(pair for pair in sums if pair[1] <= decimal(budget))
    assert (allocation.bytes, decimal(allocation.divergence), allocation.gap) == (size, divergence, 0)
    assert_consistent(choices, allocation)


@settings(max_examples=100, deadline=None)
@given(instances)
def test_the_whole_frontier_of_a_small_model(choices: list[Choice]) -> None:
    found = frontier(choices, points=10_000)
    expected = undominated_sums(everything(choices))
    assert [(a.bytes, decimal(a.divergence)) for a in found] == expected
    for allocation in found:
        assert_consistent(choices, allocation)


@settings(max_examples=100, deadline=None)
@given(instances, st.integers(0, 6))
def test_a_frontier_of_few_points_has_only_undominated_ones_and_both_ends(choices: list[Choice], points: int) -> None:
    expected = undominated_sums(everything(choices))
    found = [(a.bytes, decimal(a.divergence)) for a in frontier(choices, points)]
    assert set(found) <= set(expected)
    assert found == sorted(found)
    assert (found[0], found[-1]) == (expected[0], expected[-1])


@settings(max_examples=100, deadline=None)
@given(instances, fractions, st.randoms(use_true_random=False))
def test_the_order_of_the_choices_decides_nothing(choices: list[Choice], fraction: float, random) -> None:
    budget = at(fraction, [size for size, _ in everything(choices)])
    shuffled = choices[:]
    random.shuffle(shuffled)
    one, other = smallest_divergence(choices, budget), smallest_divergence(shuffled, budget)
    assert (dict(one.chosen), one.bytes, one.divergence) == (dict(other.chosen), other.bytes, other.divergence)


def test_equal_choices_go_to_the_first_name() -> None:
    choices = [Choice("a", name, 4, 0.5) for name in ("nvfp4", "int4", "int8")]
    assert smallest_divergence(choices, 4).chosen == {"a": "int4"}
    assert undominated(choices) == [Choice("a", "int4", 4, 0.5)]


def test_what_was_not_needed_is_not_spent() -> None:
    choices = make([(1, 0.2), (8, 0.1), (9, 0.1)], [(1, 0.0), (5, 0.0)])
    assert smallest_divergence(choices, 100) == Allocation({"g0": "p1", "g1": "p0"}, 9, 0.1)
    assert smallest_size(choices, 9.0) == Allocation({"g0": "p0", "g1": "p0"}, 2, 0.2)


def test_a_choice_off_the_convex_hull_is_found() -> None:
    # p1 lies above the line from p0 to p2, so no Lagrange multiplier reaches it.
    assert smallest_divergence(make([(0, 1.0), (5, 0.6), (10, 0.0)]), 9) == Allocation({"g0": "p1"}, 5, 0.6)


def test_a_budget_of_divergence_is_read_in_decimal() -> None:
    choices = make(*[[(1, 0.1), (2, 0.0)]] * 3)
    allocation = smallest_size(choices, 0.3)  # 0.1 + 0.1 + 0.1 > 0.3 in float64
    assert (allocation.bytes, allocation.divergence) == (3, 0.3)


@pytest.mark.parametrize("budget", [float("inf"), 1e300])
def test_a_budget_without_end(budget: float) -> None:
    choices = make([(3, 0.5), (5, 0.25)])
    assert smallest_size(choices, budget).bytes == 3
    assert smallest_divergence(choices, 10**40).divergence == 0.25


def test_a_size_that_cannot_be_met_names_the_one_that_can() -> None:
    choices = make([(1_000_000, 0.5), (2_000_000, 0.1)], [(500_000, 0.0)])
    with pytest.raises(OneVisionError, match=r"take 1,500,000 bytes, more than the budget of 1,499,999"):
        smallest_divergence(choices, 1_499_999)
    assert smallest_divergence(choices, 1_500_000).bytes == 1_500_000


@settings(max_examples=100, deadline=None)
@given(instances)
def test_a_divergence_that_cannot_be_met_names_the_one_that_can(choices: list[Choice]) -> None:
    least = min(divergence for _, divergence in everything(choices))
    below = float(least - Decimal("1e-12"))
    with pytest.raises(OneVisionError, match="more than the budget") as raised:
        smallest_size(choices, below)
    named = float(str(raised.value).split("diverge by ")[1].split(" nats")[0])
    assert smallest_size(choices, named).divergence == named == float(least)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], "no choices"),
        ([Choice("a", "int8", 1, -1e-9)], "a in int8: a divergence of -1e-09 nats is not between 0"),
        ([Choice("a", "int8", 1, float("nan"))], "a in int8: a divergence of nan"),
        ([Choice("a", "int8", 1, float("inf"))], "a in int8: a divergence of inf"),
        ([Choice("a", "int8", -1, 0.0)], "a in int8: -1 bytes is not a size"),
        ([Choice("a", "int8", 1, 0.0), Choice("a", "int8", 2, 0.0)], "a in int8 is given twice"),
    ],
)
def test_choices_that_no_measurement_gives(choices: list[Choice], message: str) -> None:
    for call in (
        lambda: smallest_divergence(choices, 9),
        lambda: smallest_size(choices, 9.0),
        lambda: frontier(choices),
    ):
        with pytest.raises(OneVisionError, match=message):
            call()


def test_a_budget_that_is_no_number() -> None:
    with pytest.raises(OneVisionError, match="not a number"):
        smallest_size(make([(1, 0.0)]), float("nan"))


def options(pairs: Sequence[tuple[int, int]]) -> Options:
    weights, costs = zip(*undominated_sums(pairs), strict=True)
    return Options(np.array(weights, np.int64), np.array(costs, np.int64))


numbers = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6))


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.lists(numbers, min_size=2, max_size=5).map(options), min_size=2, max_size=5),
    fractions,
    st.integers(1, 6),
)
def test_lists_of_few_sums_keep_the_limit_and_the_gap(groups: list[Options], fraction: float, states: int) -> None:
    sums = [
        (sum(int(w) for w, _ in p), sum(int(c) for _, c in p))
        for p in product(*(list(zip(g.weight, g.cost, strict=True)) for g in groups))
    ]
    limit = at(fraction, [weight for weight, _ in sums])
    picked, gap = minimize(groups, limit, states)
    cost = sum(int(g.cost[i]) for g, i in zip(groups, picked, strict=True))
    assert sum(int(g.weight[i]) for g, i in zip(groups, picked, strict=True)) <= limit
    assert 0 <= cost - min(c for w, c in sums if w <= limit) <= gap
    first, _ = _greedy(groups, limit)
    assert cost <= sum(int(g.cost[i]) for g, i in zip(groups, first, strict=True))


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(1, 20))
def test_merged_sums_leave_a_lighter_one_of_nearly_their_cost(costs: set[int], states: int) -> None:
    cost = np.array(sorted(costs, reverse=True))  # weights rise with the index
    kept, lost = _merge(np.arange(len(cost)), cost, states)
    assert len(kept) <= states
    for i in range(len(cost)):
        assert min(cost[k] - cost[i] for k in kept if k <= i) <= lost


def model(kind: str, groups: int = 120, seed: int = 0) -> list[Choice]:
    """Groups of 6 choices. measured: sizes and sensitivities over orders of magnitude, as a search finds them.

    layers: two sizes only, as in a decoder. line: each byte saves the same, so that no bound excludes anything.
    """
    random, choices = np.random.default_rng(seed), []
    for group in range(groups):
        size = (50_000_000, 25_000_000)[group % 2] if kind == "layers" else int(10 ** random.uniform(6, 8.6))
        sensitivity = 10 ** random.uniform(-6, -2)
        for bits, error in ((16, 0), (8.06, 0.01), (8, 0.02), (4.5, 1), (4.25, 1.3), (4.13, 2)):
            divergence = (
                size * (16 - bits) * 1e-12 if kind == "line" else error * sensitivity * random.uniform(0.5, 1.5)
            )
            choices.append(Choice(f"g{group:03}", f"w{bits}", int(size * bits / 8), divergence))
    return choices


def sizes_of(choices: list[Choice]) -> list[int]:
    groups = {choice.group: [c.bytes for c in choices if c.group == choice.group] for choice in choices}
    return [sum(map(min, groups.values())), sum(map(max, groups.values()))]


@pytest.mark.parametrize("kind", ["measured", "layers"])
@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.7])
def test_large_models_are_solved_exactly(kind: str, fraction: float) -> None:
    choices = model(kind)
    budget = at(fraction, sizes_of(choices))
    closest = smallest_divergence(choices, budget)
    smallest = smallest_size(choices, closest.divergence)  # the same question from the other side
    assert closest.gap == smallest.gap == 0
    assert closest.bytes <= budget
    assert (closest.bytes, closest.divergence) == (smallest.bytes, smallest.divergence)
    tighter = smallest_divergence(choices, closest.bytes - 1)
    assert tighter.divergence > closest.divergence


@pytest.mark.parametrize("seed", range(2))
def test_models_of_one_price_keep_their_budget_within_a_stated_gap(seed: int) -> None:
    choices = model("line", seed=seed)
    budget = at(0.4, sizes_of(choices))
    allocation = smallest_divergence(choices, budget)
    # All sums lie on one line, up to the rounding of sizes to whole bytes: what the budget leaves is what is lost.
    worst = sum(max(c.divergence for c in choices if c.group == g) for g in allocation.chosen)
    bound = worst - (budget - sizes_of(choices)[0]) * 8e-12
    assert allocation.bytes <= budget
    assert bound - 1e-9 <= allocation.divergence <= bound + allocation.gap + 1e-9
    assert allocation.gap < 1e-4 * worst


@pytest.mark.parametrize("kind", ["measured", "layers"])
def test_the_frontier_of_a_large_model(kind: str) -> None:
    choices = model(kind)
    found = frontier(choices)
    sizes, divergences = [a.bytes for a in found], [a.divergence for a in found]
    assert (np.diff(sizes) > 0).all()
    assert (np.diff(divergences) < 0).all()
    assert [sizes[0], sizes[-1]] == [sizes_of(choices)[0], sizes_of(choices)[1]]
    for allocation in found[:: len(found) // 10]:
        again = smallest_divergence(choices, allocation.bytes)
        assert (again.bytes, again.divergence) == (allocation.bytes, allocation.divergence)


def test_a_large_model_takes_well_under_a_second() -> None:
    choices = model("measured")
    started = time.process_time()
    smallest_divergence(choices, at(0.3, sizes_of(choices)))
    assert time.process_time() - started < 0.3  # 10 to 40 ms
