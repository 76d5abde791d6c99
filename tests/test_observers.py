"""Observers against brute force: numpy's own histogram and quantile, rounding of the raw data, the paper's loop."""

import io
import math
from collections.abc import Callable
from random import Random

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onevision_edge.calibration.clips import BINS, Histogram, entropy_clip, mse_clip
from onevision_edge.calibration.observers import KINDS, HistogramObserver, Observer, observer, restore
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.codes import FP4, FP8, INT4, INT8, UINT8, Codes, dequantize_linear, quantize_linear
from onevision_edge.precision.formats import FP32
from onevision_edge.precision.scales import symmetric

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
CODES = [INT8, FP8, INT4, FP4]
by_name = {"ids": lambda value: value.name}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def outliers(rng: np.random.Generator, n: int) -> np.ndarray:
    """One in two thousand values is thirty times as large."""
    return rng.standard_normal(n) * np.where(rng.random(n) < 1 / 2000, 30, 1)


DATA: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "gaussian": lambda rng, n: rng.standard_normal(n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "outlier-heavy": outliers,
    "student": lambda rng, n: rng.standard_t(3, n),
    "uniform": lambda rng, n: rng.uniform(-3, 3, n),
    "relu-like": lambda rng, n: np.maximum(rng.standard_normal(n) * 2 - 0.5, 0),
}


def data(name: str, n: int, seed: int = 0) -> np.ndarray:
    return DATA[name](generator(seed), n).astype(np.float32)


def seen(kind: str, x: np.ndarray, codes: Codes = INT8, channels: int | None = None, **options: float) -> Observer:
    made = observer(kind, codes, channels, **options)
    made.update(x)
    return made


def largest(kind: str, x: np.ndarray, codes: Codes = INT8, channels: int | None = None, **options: float) -> np.ndarray:
    return seen(kind, x, codes, channels, **options).largest()


def top(x: np.ndarray) -> float:
    """The power of two above all of |x|, not below 2^-100."""
    power, absmax = 2.0**-100, float(np.abs(x).max(initial=0))
    while power <= absmax:
        power *= 2
    return power


def round_to(codes: Codes, values: np.ndarray) -> np.ndarray:
    """Numbers in units of the scale, to the nearest that signed codes without their odd lowest one hold."""
    clipped = np.clip(values, -codes.reach[1], codes.reach[1])
    if codes.mantissa is None:
        return np.rint(clipped)
    return clipped.astype(np.float32).astype(codes.numpy).astype(np.float64)


# The histogram


@settings(max_examples=150, deadline=None)
@given(
    arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.lists(st.integers(0, 60), max_size=6),
    st.randoms(use_true_random=False),
)
def test_histogram_is_numpys_in_any_order_and_pieces(x: np.ndarray, cuts: list[int], random: Random) -> None:
    shuffled = x[random.sample(range(len(x)), len(x))]
    made = observer("mse")
    for piece in np.split(shuffled, sorted(cuts)):
        made.update(piece)
    assert isinstance(made, HistogramObserver)
    edges = np.arange(BINS + 1) * (top(x) / BINS)
    expected, _ = np.histogram(np.abs(x.astype(np.float64)), edges)
    np.testing.assert_array_equal(made.counts[0], expected)
    assert made.zeros[0] == (x == 0).sum()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.lists(st.integers(1, 30), max_size=5))
def test_histogram_per_channel(seed: int, channels: int, cuts: list[int]) -> None:
    rng = generator(seed)
    x = rng.standard_normal((30, channels)) * 2.0 ** rng.integers(-20, 20, (30, channels))
    x = (x * rng.integers(0, 2, x.shape)).astype(np.float32)
    made = observer("entropy", channels=channels)
    for piece in np.split(x, sorted(cuts)):
        made.update(piece)
    assert isinstance(made, HistogramObserver)
    assert made.counts.dtype == np.uint32
    for c in range(channels):
        edges = np.arange(BINS + 1) * (top(x[:, c]) / BINS)
        np.testing.assert_array_equal(made.counts[c], np.histogram(np.abs(x[:, c]), edges)[0])
    np.testing.assert_array_equal(made.zeros, (x == 0).sum(axis=0))


def test_ranges_that_grow_keep_the_counts_below_every_edge_they_keep() -> None:
    x = data("laplace", 10_000)
    made = seen("mse", x)
    assert isinstance(made, HistogramObserver)
    before, below = top(x), np.cumsum(made.counts[0])
    for doublings in (1, 2, 5, 40):
        made.update(np.array([before], np.float32))  # the lower end of the next range's upper half
        before *= 2
        below = np.concatenate([below[1::2], np.full(BINS // 2, below[-1])])
        below[BINS // 2 :] += 1
        np.testing.assert_array_equal(np.cumsum(made.counts[0]), below)
        larger = before * 2.0**doublings
        made.update(np.array([larger], np.float32))
        kept = below[2 ** (doublings + 1) - 1 :: 2 ** (doublings + 1)]
        now = np.cumsum(made.counts[0])
        np.testing.assert_array_equal(now[: len(kept)], kept)
        before, below = top(np.array(larger)), now


# The clips


@pytest.mark.parametrize("name", DATA)
def test_absmax_is_numpys(name: str) -> None:
    x = data(name, 3000).reshape(10, 30, 10)
    assert largest("absmax", x) == np.abs(x).max()
    np.testing.assert_array_equal(largest("absmax", x, channels=10), np.abs(x).max(axis=(0, 1)))
    assert largest("absmax", -np.abs(x)) == np.abs(x).max()


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("name", DATA)
def test_percentile_is_within_a_bin_of_the_value_of_that_rank(name: str, percentile: float) -> None:
    x = data(name, 20_003)
    exact = np.quantile(np.abs(x), percentile / 100, method="inverted_cdf")
    exact = exact or np.abs(x).max()  # the rectified half: see below
    assert abs(largest("percentile", x, percentile=percentile) - exact) <= top(x) / BINS


def test_percentile_is_linear_inside_a_bin() -> None:
    x = np.concatenate([np.full(1000, 1.0), [1.9]]).astype(np.float32)  # the bin of 1 is [1, 1 + 2/2048)
    for percentile in (10.0, 50.0, 75.0):
        expected = 1 + percentile / 100 * 1001 / 1000 * 2 / BINS
        assert largest("percentile", x, percentile=percentile) == pytest.approx(expected, rel=1e-7)
    assert largest("percentile", x, percentile=100) == np.float32(1.9)


def test_percentile_of_a_channel_that_is_hardly_ever_active_is_its_largest() -> None:
    x = np.zeros(100_000, np.float32)
    x[7] = 3
    assert largest("percentile", x) == 3


def squared_error(x: np.ndarray, clip: float, codes: Codes) -> float:
    scale = float(clip) / codes.reach[1]
    wide = x.astype(np.float64)
    return float(np.mean((round_to(codes, wide / scale) * scale - wide) ** 2))


@pytest.mark.parametrize("codes", CODES, **by_name)
@pytest.mark.parametrize("name", DATA)
def test_mse_is_the_best_clip_of_the_data_itself(name: str, codes: Codes) -> None:
    x = data(name, 100_000)  # with 20,000, chance alone moves the error of neighbouring clips by 2 %
    clip, absmax = float(largest("mse", x, codes)), float(np.abs(x).max())
    coarse = min(absmax * np.geomspace(1, 0.02, 100), key=lambda c: squared_error(x[::10], c, codes))
    best = min(squared_error(x, c, codes) for c in np.minimum(coarse * np.linspace(0.9, 1.1, 41), absmax))
    assert squared_error(x, clip, codes) <= 1.01 * best
    assert clip <= absmax


def spread(counts: np.ndarray, points: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """The values a histogram stands for, so many to a bin, and their weights."""
    places = np.flatnonzero(counts)
    x = (places[:, None] + (np.arange(points) + 0.5) / points).reshape(-1)
    return x, np.repeat(counts[places] / points, points)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1023), st.integers(1, 10**6)), max_size=12),
    st.tuples(st.integers(1024, BINS - 1), st.integers(1, 1000)),
    st.sampled_from([INT8, FP8]),
)
def test_mse_is_never_worse_than_absmax_on_the_histogram(
    bulk: list[tuple[int, int]], tail: tuple[int, int], codes: Codes
) -> None:
    counts = np.zeros(BINS)
    for place, count in [*bulk, tail]:
        counts[place] += count
    absmax = tail[0] + 0.75
    clip = float(mse_clip(Histogram(counts[None], np.zeros(1), np.array([absmax])), codes)[0])
    x, weights = spread(counts)

    def error(limit: float) -> float:
        scale = limit / codes.reach[1]
        return float(weights @ (round_to(codes, x / scale) * scale - x) ** 2)

    assert clip <= absmax
    assert error(clip) <= error(absmax) * (1 + 1e-3)  # 64 points instead of the integral


def expected_entropy_clip(counts: np.ndarray, absmax: float, codes: Codes) -> float:
    """As the slides say it, one candidate after another; lengths in bins."""
    levels = 127 if codes is FP8 else round(codes.reach[1]) + 1 if codes.mantissa is None else 8
    occupied = int(np.flatnonzero(counts)[-1]) + 1
    divergences = {}
    for i in range(levels, occupied + 1):
        p = counts[:i].copy()
        p[-1] += counts[i:].sum()
        code = round_to(codes, (np.arange(i) + 0.5) * codes.reach[1] / i)
        q = np.zeros(i)
        _, group = np.unique(code, return_inverse=True)
        filled = counts[:i] > 0
        mean = np.bincount(group, counts[:i]) / np.maximum(np.bincount(group, filled), 1)
        q[filled] = mean[group][filled]
        if not q.sum():
            continue
        p, q = p / p.sum(), q / q.sum()
        q = (1 - 1e-4) * q + 1e-4 / i
        some = p > 0
        divergences[i] = float(np.sum(p[some] * np.log(p[some] / q[some])))
    return min(min(divergences, key=divergences.__getitem__), absmax)


@pytest.mark.parametrize("codes", CODES, **by_name)
@pytest.mark.parametrize("name", DATA)
def test_entropy_is_the_loop_of_its_source(name: str, codes: Codes) -> None:
    x = data(name, 50_000, seed=1)
    width = top(x) / BINS
    magnitudes = np.abs(x[x != 0]).astype(np.float64)
    counts = np.histogram(magnitudes, np.arange(BINS + 1) * width)[0].astype(np.float64)
    expected = expected_entropy_clip(counts, float(np.abs(x).max()) / width, codes)
    assert largest("entropy", x, codes) == np.float32(expected * width)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1024, BINS), st.sampled_from([INT8, FP8]))
def test_entropy_of_ragged_histograms_with_empty_bins(seed: int, occupied: int, codes: Codes) -> None:
    rng = generator(seed)
    counts = np.zeros(BINS)
    counts[:occupied] = rng.poisson(1000 * np.exp(-np.arange(occupied) / rng.uniform(20, 500)))
    counts[occupied - 1] += 1
    clip = entropy_clip(Histogram(counts[None], np.zeros(1), np.array([occupied - 0.5])), codes)[0]
    assert min(clip, occupied - 0.5) == expected_entropy_clip(counts, occupied - 0.5, codes)


def test_all_but_absmax_clip_a_lone_outlier() -> None:
    x = data("gaussian", 100_000)
    x[777] = 100
    assert largest("absmax", x) == 100
    assert 3.5 < largest("percentile", x) < 4.5
    assert largest("entropy", x) < 10
    # Least (100 - c)^2 / n + (c / 127)^2 / 12, of the outlier and of rounding.
    optimum = 100 / (1 + len(x) / (12 * 127**2))
    assert largest("mse", x) == pytest.approx(optimum, rel=0.02)
    assert largest("mse", x, INT4) < 20


@pytest.mark.parametrize("codes", [INT8, FP8], **by_name)
def test_clips_are_for_the_project_s_own_quantiser(codes: Codes) -> None:
    x = data("gaussian", 20_000)
    errors = {}
    for kind in KINDS:
        scale = symmetric(float(largest(kind, x, codes)), codes)
        restored = dequantize_linear(quantize_linear(x, scale, codes), scale, FP32)
        errors[kind] = float(np.mean((restored - x) ** 2))
    assert errors["mse"] <= 1.001 * min(errors.values())


@pytest.mark.parametrize("codes", [INT8, FP8], **by_name)
@pytest.mark.parametrize("kind", KINDS)
def test_constants_are_kept(kind: str, codes: Codes) -> None:
    for value in (1.0, 0.7, -3.0, 1e-44, 3e38):
        x = np.full(100, value, np.float32)
        assert largest(kind, x, codes) == pytest.approx(abs(x[0]), rel=2 / BINS)


# Streams


@pytest.mark.parametrize("codes", [INT8, FP8], **by_name)
@pytest.mark.parametrize("kind", KINDS)
def test_per_channel_is_per_tensor_of_each_channel(kind: str, codes: Codes) -> None:
    x = np.stack([data(name, 2000) * 10.0**i for i, name in enumerate(DATA)], axis=1).astype(np.float32)
    x = np.concatenate([x, np.zeros((2000, 1), np.float32)], axis=1)
    clips = largest(kind, x.reshape(4, 500, -1), codes, x.shape[1])
    assert clips.dtype == np.float32
    np.testing.assert_array_equal(clips, [largest(kind, column, codes) for column in x.T])


@pytest.mark.parametrize("channels", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_observer_goes_on_as_if_it_had_not_stopped(kind: str, channels: int | None) -> None:
    pieces = [data("student", 500, seed).reshape(100, 5) * 4.0**seed for seed in range(4)]
    whole, part = (observer(kind, FP8, channels, percentile=99.0) for _ in range(2))
    for piece in pieces:
        whole.update(piece)
    part.update(pieces[0])
    part.update(pieces[1])
    file = io.BytesIO()
    state = part.state()
    part.update(pieces[3])  # what was saved does not move
    np.savez(file, **state)
    file.seek(0)
    with np.load(file) as saved:
        resumed = restore(saved)
    resumed.update(pieces[2])
    resumed.update(pieces[3])
    np.testing.assert_array_equal(resumed.largest(), whole.largest())
    expected = whole.state()
    assert expected["rows"] == (400 if channels else 2000)
    assert resumed.state().keys() == expected.keys()
    for name, array in resumed.state().items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_order_and_pieces_do_not_matter(kind: str) -> None:
    x = data("student", 200_000).reshape(-1, 4)  # more than one internal piece
    clips = {float(largest(kind, x)), float(largest(kind, x[::-1].T))}
    made = observer(kind)
    for piece in np.array_split(x, 7):
        made.update(piece)
    assert clips == {float(made.largest())}


@pytest.mark.parametrize("kind", KINDS)
def test_float16_is_seen_as_the_same_numbers(kind: str) -> None:
    x = data("laplace", 4000).reshape(-1, 8).astype(np.float16)
    for channels in (None, 8):
        clips = largest(kind, x, channels=channels)
        np.testing.assert_array_equal(clips, largest(kind, x.astype(np.float32), channels=channels))
        assert clips.dtype == np.float32
        assert clips.shape == (() if channels is None else (8,))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_updates_and_no_channels(kind: str) -> None:
    made = seen(kind, np.zeros((2, 0, 3), np.float32), channels=3)
    with pytest.raises(OneVisionError, match="no activations were seen"):
        made.largest()
    x = data("gaussian", 300).reshape(-1, 3)
    made.update(x)
    made.update(x[:0])
    np.testing.assert_array_equal(made.largest(), largest(kind, x, channels=3))
    assert largest(kind, np.zeros((5, 0), np.float32), channels=0).shape == (0,)
    with pytest.raises(OneVisionError, match="no activations were seen"):
        restore(observer(kind).state()).largest()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_have_no_clip(kind: str) -> None:
    zeros = np.array([0.0, -0.0] * 6, np.float32).reshape(6, 2)
    assert largest(kind, zeros) == 0
    np.testing.assert_array_equal(largest(kind, zeros, channels=2), [0, 0])
    made = seen(kind, zeros)
    made.update(np.ones(12, np.float32))
    assert math.isclose(made.largest(), 1, rel_tol=2 / BINS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_is_not_finite_is_refused_and_leaves_no_trace(kind: str, bad: float, dtype: type) -> None:
    x = data("gaussian", 80_000).reshape(-1, 4).astype(dtype)  # more than one internal piece
    made = seen(kind, x, channels=4)
    before = made.state()
    damaged = x * dtype(100)
    damaged[-1, 2] = bad
    with pytest.raises(OneVisionError, match="NaN or infinity"):
        made.update(damaged)
    for name, array in made.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_mistakes_are_named() -> None:
    with pytest.raises(OneVisionError, match="unknown observer 'kl': choose one of absmax"):
        observer("kl")
    with pytest.raises(OneVisionError, match="uint8"):
        observer("mse", UINT8)
    for percentile in (0.0, -1.0, 100.1, np.nan):
        with pytest.raises(OneVisionError, match="percentile"):
            observer("percentile", percentile=percentile)
    for shape in ((3, 4), (), (12,)):
        with pytest.raises(OneVisionError, match="do not end in 3 channels"):
            observer("mse", channels=3).update(np.zeros(shape, np.float32))
    state = seen("mse", np.ones(3, np.float32)).state()
    del state["counts"]
    with pytest.raises(OneVisionError, match="'counts'"):
        restore(state)


def test_bfloat16_is_seen_as_the_same_numbers() -> None:
    x = data("gaussian", 1000).astype(ml_dtypes.bfloat16)
    assert largest("mse", x) == largest("mse", x.astype(np.float32))
