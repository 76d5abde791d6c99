"""How sure a figure is: bootstrap intervals over rows, and paired tests of one model against another.

A row is the unit: the positions of one answer hang together, so they are drawn together or not at all. Intervals are
percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13), the same under one seed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from ...errors import OneVisionError

RESAMPLES, LEVEL = 2000, 0.95
NORMAL_LIMIT = NormalDist().inv_cdf((1 + LEVEL) / 2)  # standard errors to either side of a mean, 1.96
_BLOCK = 1 << 22  # drawn rows at a time, 32 MB of them


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure over n rows and its confidence interval; the bounds are None where there is one row, or none finite."""

    value: float
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record; a value that is not finite becomes None."""
        return {**asdict(self), "value": _finite(self.value)}


@dataclass(frozen=True, slots=True)
class Paired:
    """Two models on the same rows. difference: candidate - reference, with its confidence interval.

    p_value: the chance of a difference as bad as this, or worse, if the candidate were no more than `margin` worse
    than the reference; small means that it is worse. better, worse: rows on which the candidate is so.
    """

    metric: str
    difference: float
    low: float
    high: float
    margin: float
    p_value: float
    n: int
    better: int
    worse: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        return asdict(self)


def bootstrap(
    sums: np.ndarray, counts: np.ndarray, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """The mean of all positions, sum(sums) / sum(counts), rows drawn with replacement. sums, counts: [rows]."""
    sums, counts = _rows(sums), _rows(counts)
    if len(sums) != len(counts) or counts.sum() <= 0:
        raise OneVisionError(f"there are {len(sums)} sums and {len(counts)} counts; a mean needs as many, and some")
    drawn = []
    for block in _draws(len(sums), seed, resamples):
        total = counts[block].sum(axis=1)
        drawn.append(sums[block].sum(axis=1)[total > 0] / total[total > 0])
    return _interval(float(sums.sum() / counts.sum()), np.concatenate(drawn), len(sums), level)


def bootstrap_statistic(
    values: Sequence[np.ndarray] | np.ndarray,
    statistic: Callable[[np.ndarray], float],
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """A statistic of all values, such as their median. values: one for each row [rows], or an array for each row."""
    rows = [np.atleast_1d(np.asarray(row, np.float64)) for row in values]
    if not sum(map(len, rows)):
        raise OneVisionError("there are no values; a statistic needs at least one")
    drawn = [
        statistic(np.concatenate([rows[i] for i in draw]))
        for block in _draws(len(rows), seed, resamples)
        for draw in block
        if any(len(rows[i]) for i in draw)
    ]
    return _interval(float(statistic(np.concatenate(rows))), np.array(drawn), len(rows), level)


def paired(
    metric: str,
    candidate: np.ndarray,
    reference: np.ndarray,
    margin: float,
    seed: int,
    higher_is_better: bool = True,
) -> Paired:
    """Compare scores of the same rows, [n] each; "worse by more than margin" is what is tested.

    Scores of 0 and 1: Tango's score test and interval (Statistics in Medicine 17, 1998, 891-908), which at margin 0 is
    McNemar's, and stays honest where few rows differ, or none, and a bootstrap sees no spread. Other scores: the
    bootstrap of the mean difference; p_value is the share of resampled means that are within the margin. Both agree
    with their interval: it lies beyond the margin where p_value < 0.025. Raises OneVisionError for no rows.
    """
    found, wanted = _rows(candidate), _rows(reference)
    if len(found) != len(wanted) or not len(found):
        raise OneVisionError(f"{metric}: {len(found)} rows cannot be paired with {len(wanted)}")
    gain = (found - wanted) * (1 if higher_is_better else -1)
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    if np.isin(found, (0, 1)).all() and np.isin(wanted, (0, 1)).all():
        low, high, p_value = _binary(better, worse, len(gain), margin)
    else:
        low, high, p_value = _resampled(gain, margin, seed)
    if not higher_is_better:
        low, high = -high, -low
    difference = float((found - wanted).mean())
    return Paired(metric, difference, low, high, margin, p_value, len(gain), better, worse)


def _binary(better: int, worse: int, n: int, margin: float) -> tuple[float, float, float]:
    low, high = (_crossing(lambda d: _tango(better, worse, n, d), end) for end in (NORMAL_LIMIT, -NORMAL_LIMIT))
    return low, high, NormalDist().cdf(_tango(better, worse, n, -margin))


def _tango(better: int, worse: int, n: int, difference: float) -> float:
    """The score statistic of a true difference of (better - worse) / n, standard normal under it."""
    if not -1 < difference < 1:
        return math.copysign(math.inf, -difference)
    a, b = 2 * n, -better - worse + (2 * n - better + worse) * difference
    c = -worse * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 4 * a * c, 0)) - b) / (2 * a)  # of rows that become worse, most likely
    variance = n * (2 * share + difference * (1 - difference))
    distance = better - worse - n * difference
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0


def _crossing(statistic: Callable[[float], float], limit: float) -> float:
    """Where a statistic that falls from -1 to 1 crosses a limit, by bisection to 1e-15."""
    low, high = -1.0, 1.0
    for _ in range(51):
        middle = (low + high) / 2
        low, high = (middle, high) if statistic(middle) > limit else (low, middle)
    return (low + high) / 2


def _resampled(gain: np.ndarray, margin: float, seed: int) -> tuple[float, float, float]:
    means = np.concatenate([gain[block].mean(axis=1) for block in _draws(len(gain), seed, RESAMPLES)])
    low, high = np.quantile(means, _tails(LEVEL))
    return float(low), float(high), (1 + int((means >= -margin).sum())) / (1 + len(means))


def _draws(rows: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Indices of rows drawn with replacement, [resamples, rows] in blocks."""
    rng, left = np.random.default_rng(seed), resamples
    while left:
        block = min(left, max(_BLOCK // rows, 1))
        yield rng.integers(0, rows, (block, rows))
        left -= block


def _interval(value: float, drawn: np.ndarray, rows: int, level: float) -> Interval:
    if rows < 2 or not np.isfinite(drawn).all() or not math.isfinite(value):
        return Interval(value, None, None, rows)
    low, high = np.quantile(drawn, _tails(level))
    return Interval(value, float(low), float(high), rows)


def _tails(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2


def _rows(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64).reshape(-1)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
