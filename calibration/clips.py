"""From a histogram of |x| to the clip of a symmetric quantiser: by percentile, squared error, or divergence.

All lengths are in widths of one bin, so that what depends on the codes alone is worked out once for all histograms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..precision.codes import Codes, round_to_codes

# As in the source of `entropy`. The largest value is in the upper half, so its INT8 step spans 8 to 16 bins, and a
# clip can be placed within 0.1 % of it. The widest input of a Linear (9,728 channels) takes 80 MB per channel.
BINS = 2048
_RATIOS = 2.0 ** -(np.arange(640) / 64)  # clips tried by `mse`, in parts of the range: 1.1 % apart, 1 to 1/1000
_SMOOTHING = 1e-4  # part of the quantised distribution that `entropy` spreads over all bins


@dataclass(frozen=True, slots=True)
class Histogram:
    """|x| of some channels, lengths in widths of one bin. All float64, all counts exact.

    counts: [channels, bins], exact zeros left out: every clip encodes them exactly. zeros: [channels], how many
    those are. largest: [channels].
    """

    counts: np.ndarray
    zeros: np.ndarray
    largest: np.ndarray


Clip = Callable[[Histogram], np.ndarray]  # -> float64 [channels], in widths of one bin


def percentile_clip(seen: Histogram, percentile: float) -> np.ndarray:
    """The |x| that `percentile` percent of the values, zeros among them, do not exceed.

    Within one bin (at most 1/1024 of the largest) of the value of that rank, and linear between the edges of the bin.
    The largest where that is zero, so that a channel that is hardly ever active is not lost.
    """
    cumulative = seen.zeros[:, None] + seen.counts.cumsum(axis=1)
    wanted = percentile / 100 * cumulative[:, -1]
    place = (cumulative < wanted[:, None]).sum(axis=1)
    lanes = np.arange(len(place))
    inside = np.maximum(seen.counts[lanes, place], 1)
    clip = place + 1 - (cumulative[lanes, place] - wanted) / inside
    return np.where(wanted > seen.zeros, clip, seen.largest)


def mse_clip(seen: Histogram, codes: Codes) -> np.ndarray:
    """The clip with the least expected squared error of rounding to `codes`: one of 640, or the largest value.

    Values count as spread evenly inside their bin, over which the error is integrated exactly.
    """
    tried, errors = _error_table(codes)
    errors = seen.counts @ errors.T
    errors[tried >= seen.largest[:, None]] = np.inf
    clips = np.where(seen.largest > 0, seen.largest, 1)[:, None]
    unclipped = np.einsum("cb,cb->c", seen.counts, _rounding_errors(clips, codes))
    best = errors.argmin(axis=1)
    better = errors[np.arange(len(best)), best] < unclipped
    return np.where(better, tried[best], seen.largest)


@lru_cache
def _error_table(codes: Codes) -> tuple[np.ndarray, np.ndarray]:
    """Clips, in bins, and the mean squared error of each in each bin [clips, BINS]."""
    clips = BINS * _RATIOS
    return clips, _rounding_errors(clips[:, None], codes)


def _rounding_errors(clips: np.ndarray, codes: Codes) -> np.ndarray:
    """Mean of (x - Q(x))^2 over each bin, for clips [n, 1]: [n, BINS]. Unit of x: one bin."""
    levels = _levels(codes)
    # From 0 to x of (u - Q(u))^2: gap^3 / 12 for each gap between levels below, and the third power inside the last.
    below = np.concatenate([[0], np.cumsum(np.diff(levels) ** 3 / 12)])
    edges = np.arange(BINS + 1) * (levels[-1] / clips)
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, edges)
    integral = below[nearest] + (edges - levels[nearest]) ** 3 / 3
    return np.diff(integral, axis=1) * (clips / levels[-1]) ** 3


def entropy_clip(seen: Histogram, codes: Codes) -> np.ndarray:
    """The clip whose quantised distribution diverges least from what was seen, channel by channel.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017. For every number of bins from that of the levels on:
    P is those bins, the values beyond them added to the last; Q is those bins without the values beyond, merged and
    spread evenly over the ones of each merger that are not empty; the least KL(P || Q) wins, the smallest clip of
    equals. Bins merge where their centres round to one code, which serves levels at any distances. Of Q, 1e-4 is
    spread over all bins, so that an empty last bin, where P has what was clipped, costs much but not infinity.
    """
    return np.array(
        [_entropy_clip(counts, last, codes) for counts, last in zip(seen.counts, seen.largest, strict=True)]
    )


def _entropy_clip(counts: np.ndarray, largest: float, codes: Codes) -> float:
    """One channel's: the bins kept, or `largest` where fewer bins than levels have been reached."""
    bounds = _mergers(codes)
    first = bounds.shape[1] - 1
    bounds = bounds[: max(int(largest) + 2 - first, 0)]
    if not len(bounds):
        return largest
    return first + float(np.argmin(_divergences(counts, bounds)))


def _divergences(counts: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """KL(P || Q) of each candidate, from sums over whole mergers: within one, log Q is the same in every bin."""
    kept = bounds[:, -1]  # bins
    sums = np.concatenate([[0], np.cumsum(counts)])
    total, inside = sums[-1], sums[kept]
    merged = np.diff(sums[bounds], axis=1)
    filled = np.diff(np.concatenate([[0], np.cumsum(counts > 0)])[bounds], axis=1)
    floor = _SMOOTHING / kept
    spread = merged / (np.maximum(filled, 1) * np.maximum(inside, 1)[:, None])
    logs = np.log((1 - _SMOOTHING) * spread + floor[:, None])
    last, beyond = counts[kept - 1], total - inside
    clipped = beyond * np.where(last > 0, logs[:, -1], np.log(floor))
    own = np.concatenate([[0], np.cumsum(_x_log_x(counts))])[kept - 1] + _x_log_x(last + beyond)
    divergences = (own - np.einsum("cl,cl->c", merged, logs) - clipped) / total - np.log(total)
    return np.where(inside > 0, divergences, np.inf)


def _x_log_x(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.maximum(x, 1))


@lru_cache
def _mergers(codes: Codes) -> np.ndarray:
    """Of each candidate, from as many bins as there are levels: the first bin of each level, and the number of bins."""
    levels = _levels(codes)
    centres = np.arange(BINS, dtype=np.float32) + np.float32(0.5)
    bounds = np.empty((BINS + 1 - len(levels), len(levels) + 1), np.int16)
    for row, kept in zip(bounds, range(len(levels), BINS + 1), strict=True):
        rounded = centres[:kept] * np.float32(levels[-1]) / np.float32(kept)  # ties stay ties: the product is exact
        round_to_codes(rounded, codes, np.empty_like(rounded))
        row[:-1], row[-1] = np.searchsorted(rounded, levels), kept
    return bounds


@lru_cache
def _levels(codes: Codes) -> np.ndarray:
    """The magnitudes from 0 to `codes.reach[1]`, ascending, float64."""
    stored = np.arange(1 << codes.bits, dtype=np.uint8).view(codes.numpy).astype(np.float64)
    return np.unique(np.abs(stored[np.abs(stored) <= codes.reach[1]]))
