"""Statistics of reports: intervals against formulas and known coverage, Tango's test against a search."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from onevision_edge.errors import OneVisionError
from onevision_edge.report.parity.statistics import Interval, bootstrap, bootstrap_statistic, paired


def test_a_mean_is_of_all_positions_and_rows_stay_whole() -> None:
    found = bootstrap(np.array([1, 2, 3]), np.array([1, 4, 5]), seed=0)
    assert (found.value, found.n) == (0.6, 3)
    # The smallest and the largest mean that three rows can give; one in 27 draws is the same row thrice.
    assert (found.low, found.high) == (0.5, 1.0)


def test_an_interval_is_about_the_normal_one() -> None:
    values = np.random.default_rng(1).standard_normal(400)
    found = bootstrap(values, np.ones(400), seed=2)
    assert found.low is not None
    assert found.high is not None
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)


def test_intervals_cover_the_truth() -> None:
    """95 % of the time, less a little where rows are few: 40 rows of up to 6 positions that hang together."""
    rng, covered = np.random.default_rng(3), 0
    for seed in range(200):
        counts = rng.integers(1, 7, 40)
        sums = rng.binomial(counts, np.clip(rng.normal(0.7, 0.2, 40), 0, 1))
        found = bootstrap(sums, counts, seed, resamples=400)
        covered += found.low <= 0.694 <= found.high  # type: ignore[operator]
    assert 180 <= covered <= 198


@pytest.mark.parametrize(
    "function",
    [
        lambda seed: bootstrap(np.arange(9), np.ones(9), seed),
        lambda seed: bootstrap_statistic(np.arange(9.0), np.median, seed),
    ],
)
def test_a_seed_decides_alone(function: Callable[[int], Interval]) -> None:
    assert function(5) == function(5)
    assert bootstrap(np.arange(99) ** 2, np.ones(99), 5) != bootstrap(np.arange(99) ** 2, np.ones(99), 6)


def test_large_data_is_drawn_in_blocks_and_is_the_same() -> None:
    values = np.random.default_rng(0).random(30_000)
    found = bootstrap(values, np.ones(30_000), 7, resamples=300)
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(1 / 12 / 30_000), rel=0.15)  # type: ignore[operator]


def test_a_statistic_of_rows_of_unlike_length() -> None:
    found = bootstrap_statistic([np.array([1.0, 2]), np.array([3.0]), np.array([])], np.max, seed=0)
    assert (found.value, found.low, found.high, found.n) == (3.0, 2.0, 3.0, 3)


def test_one_row_has_no_interval_and_what_is_not_finite_is_null() -> None:
    assert bootstrap(np.array([1]), np.array([2]), 0).to_dict() == {"value": 0.5, "low": None, "high": None, "n": 1}
    found = bootstrap(np.array([1, math.nan]), np.array([2, 2]), 0).to_dict()
    assert found == {"value": None, "low": None, "high": None, "n": 2}


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap(np.array([]), np.array([]), 0),
        lambda: bootstrap(np.array([0]), np.array([0]), 0),
        lambda: bootstrap_statistic([], np.mean, 0),
        lambda: paired("anls", np.array([]), np.array([]), 0, 0),
        lambda: paired("anls", np.ones(2), np.ones(3), 0, 0),
    ],
)
def test_no_rows_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(OneVisionError):
        call()


def scores(both: int, better: int, worse: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of 0 and 1 of a candidate and a reference."""
    candidate = [1] * both + [1] * better + [0] * worse + [0] * neither
    return np.array(candidate), np.array([1] * both + [0] * better + [1] * worse + [0] * neither)


@pytest.mark.parametrize(("better", "worse", "n"), [(0, 1, 44), (4, 14, 75), (9, 2, 40)])
def test_an_interval_ends_where_the_score_is_1_96(better: int, worse: int, n: int) -> None:
    """The likeliest shares under a true difference are searched here, not solved for."""
    found = paired("accuracy", *scores(n - better - worse, better, worse, 0), 0.1, 0)
    for difference, wanted in ((found.low, 1.959964), (found.high, -1.959964)):
        share = np.linspace(max(0, -difference) + 1e-9, (1 - difference) / 2 - 1e-9, 2_000_001)
        likelihood = (n - better - worse) * np.log(1 - 2 * share - difference)
        likelihood += better * np.log(share + difference) + worse * np.log(share)
        best = share[likelihood.argmax()]
        deviation = math.sqrt(n * (2 * best + difference - difference**2))
        assert (better - worse - n * difference) / deviation == pytest.approx(wanted, abs=1e-4)


def test_at_no_margin_the_test_is_mcnemars() -> None:
    found = paired("accuracy", *scores(50, 4, 14, 7), 0.0, 0)
    wanted = 0.5 * math.erfc((14 - 4) / math.sqrt(14 + 4) / math.sqrt(2))
    assert found.p_value == pytest.approx(wanted, rel=1e-9)
    assert (found.better, found.worse, found.n) == (4, 14, 75)


@pytest.mark.parametrize("worse", range(0, 30, 3))
def test_p_value_and_interval_agree(worse: int) -> None:
    found = paired("accuracy", *scores(150, 3, worse, 20), 0.03, 0)
    assert (found.p_value < 0.025) == (found.high < -0.03)


def test_where_no_row_differs_the_interval_still_has_a_width() -> None:
    """z² / (n + z²), as Tango's closed form says for no discordant pairs."""
    found = paired("accuracy", *scores(300, 0, 0, 59), 0.02, 0)
    assert found.high == pytest.approx(1.959964**2 / (359 + 1.959964**2), rel=1e-6)
    assert found.low == pytest.approx(-found.high)
    assert found.p_value > 0.99


def test_every_answer_worse() -> None:
    found = paired("accuracy", *scores(0, 0, 40, 0), 0.1, 0)
    assert (found.difference, found.low) == (-1, pytest.approx(-1, abs=1e-9))
    assert found.p_value < 1e-6


def test_other_scores_are_drawn() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.random(200)
    same, worse = wanted + rng.normal(0, 0.02, 200), wanted + rng.normal(-0.05, 0.02, 200)
    assert paired("anls", same, wanted, 0.02, 1).p_value > 0.99
    found = paired("anls", worse, wanted, 0.02, 1)
    assert found.p_value == pytest.approx(1 / 2001)
    assert found.low < found.difference < found.high < -0.04


def test_where_less_is_better_more_is_worse() -> None:
    wanted = np.linspace(0, 0.5, 50)
    found = paired("cer", wanted + 0.1, wanted, 0.02, 1, higher_is_better=False)
    assert (found.better, found.worse) == (0, 50)
    assert found.difference == pytest.approx(0.1)
    assert found.low <= 0.1 + 1e-12
    assert found.low > 0.09
    assert found.p_value < 0.001
    assert paired("cer", wanted - 0.1, wanted, 0.02, 1, higher_is_better=False).p_value == 1
