"""Scales on activations: candidates against their papers' formulas, the search against all of them tried by hand."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onevision_edge.calibration import awq, smoothquant
from onevision_edge.calibration.bias_correction import corrected
from onevision_edge.calibration.migration import Product, fake_quantize, search
from onevision_edge.precision.codes import FP8, INT8
from onevision_edge.precision.plan import PRECISIONS

STRENGTHS = [round(0.05 * i, 2) for i in range(21)]


def outliers(seed: int, rows: int = 40, channels: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """An activation with two channels of thirty times the others, and a matrix that reads it."""
    rng = np.random.default_rng(seed)
    x, weights = rng.standard_normal((rows, channels)), rng.standard_normal((channels, 24)) / 6
    x[:, :2] *= 30
    return x.astype(np.float32), weights.astype(np.float32)


def test_smoothquant_s_formula() -> None:
    """s = max|x|^a / max|w|^(1-a), all multiplied by one number so that their geometric mean is 1."""
    x, weights = outliers(0)
    activations, rows = np.abs(x).max(axis=0), np.abs(weights).max(axis=1)
    found = list(smoothquant.candidates(activations, rows))
    assert [strength for strength, _ in found] == STRENGTHS
    for strength, scale in found:
        wanted = activations.astype(float) ** strength / rows.astype(float) ** (1 - strength)
        np.testing.assert_allclose(scale, wanted / np.exp(np.log(wanted).mean()), rtol=1e-6)
    halves = dict(found)[0.5]  # where both ranges become one another's, but for that number
    ratio = activations / halves / (rows * halves)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def test_awq_s_formula() -> None:
    """s = mean|x|^a, in the same units; with an exponent of 0 nothing is scaled."""
    magnitude = np.abs(outliers(1)[0]).mean(axis=0)
    found = list(awq.candidates(magnitude))
    assert [exponent for exponent, _ in found] == STRENGTHS
    for exponent, scale in found:
        wanted = magnitude.astype(float) ** exponent
        np.testing.assert_allclose(scale, wanted / np.exp(np.log(wanted).mean()), rtol=1e-6)
    np.testing.assert_array_equal(found[0][1], np.ones(32, np.float32))


def test_channels_never_seen_keep_their_scale() -> None:
    magnitude = np.array([0, 2, 8, 0], np.float32)
    for _, scale in awq.candidates(magnitude):
        assert (scale[[0, 3]] == 1).all()
        assert scale[1] * scale[2] == pytest.approx(1)
    for _, scale in smoothquant.candidates(magnitude, np.array([1, 0, 1, 0], np.float32)):
        np.testing.assert_array_equal(scale, np.ones(4, np.float32))  # only one channel has both
    for _, scale in awq.candidates(np.zeros(3, np.float32)):
        np.testing.assert_array_equal(scale, np.ones(3, np.float32))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 1e4))
def test_fake_quantize_is_a_code_s_worth(seed: int, largest: float) -> None:
    x = (np.random.default_rng(seed).standard_normal(60) * largest).astype(np.float32)
    step = np.float32(largest / 127)
    codes = np.clip(np.rint(x / step), -128, 127)
    np.testing.assert_array_equal(fake_quantize(x, largest, INT8), (codes * step).astype(np.float32))
    step = np.float32(largest / 448)
    codes = np.clip(x / step, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(fake_quantize(x, largest, FP8), codes * step)


def by_hand(x: np.ndarray, weights: np.ndarray, scale: np.ndarray, precision: str) -> float:
    """The relative error of a product, in float64: INT8 by channel, or INT4 in blocks of 32."""
    scaled, w = x.astype(float) / scale, weights.astype(float) * scale[:, None]
    if precision == "int8":
        step = np.abs(scaled).max() / 127
        scaled = np.rint(scaled / step) * step
        step = np.abs(w).max(axis=0) / 127
    else:
        step = np.maximum(w.max(axis=0) / 7, -w.min(axis=0) / 8)
    difference = scaled @ (np.rint(w / step) * step) - x.astype(float) @ weights
    return float(np.square(difference).sum() / np.square(x.astype(float) @ weights).sum())


@pytest.mark.parametrize(("name", "precision"), [("int8", "int8"), ("int4-block32", "int4")])
def test_the_search_takes_the_best_candidate(name: str, precision: str) -> None:
    x, weights = outliers(2)
    absmax, magnitude = np.abs(x).max(axis=0), np.abs(x).mean(axis=0)
    smooth = smoothquant.candidates(absmax, np.abs(weights).max(axis=1))
    candidates = list(smooth if precision == "int8" else awq.candidates(magnitude))
    strength, scale = search(x, absmax, [Product(PRECISIONS[name], weights)], candidates, gain=0.01)
    found = {a: by_hand(x, weights, s, precision) for a, s in candidates}
    best = min(found, key=lambda a: found[a])
    assert strength == best
    np.testing.assert_array_equal(scale, dict(candidates)[best])
    assert found[best] < by_hand(x, weights, np.ones(32), precision) * (0.3 if precision == "int8" else 0.9)


def test_products_that_share_an_activation_count_alike() -> None:
    """Each in parts of its own size, so that a large one does not decide alone."""
    x, weights = outliers(10)
    other = np.ascontiguousarray(weights[::-1])
    absmax = np.abs(x).max(axis=0)
    candidates = list(smoothquant.candidates(absmax, np.abs(weights).max(axis=1)))
    errors = np.array([[by_hand(x, w, scale, "int8") for w in (weights, other)] for _, scale in candidates])
    wanted = candidates[errors.sum(axis=1).argmin()][0]
    assert wanted not in [candidates[i][0] for i in errors.argmin(axis=0)]  # neither alone would have taken it
    for factor in (0.001, 1, 1000):
        products = [Product(PRECISIONS["int8"], weights), Product(PRECISIONS["int8"], other * np.float32(factor))]
        assert search(x, absmax, products, candidates, gain=0.01)[0] == wanted


def test_less_than_the_gain_asked_for_changes_nothing() -> None:
    x, weights = outliers(4)
    absmax = np.abs(x).max(axis=0)
    candidates = list(smoothquant.candidates(absmax, np.abs(weights).max(axis=1)))
    plain = by_hand(x, weights, np.ones(32), "int8")
    saved = 1 - min(by_hand(x, weights, scale, "int8") for _, scale in candidates) / plain
    for gain, taken in ((saved - 0.01, True), (saved + 0.01, False)):
        strength, scale = search(x, absmax, [Product(PRECISIONS["int8"], weights)], candidates, gain)
        assert (strength is not None) is taken
        assert (scale == 1).all() is np.bool_(not taken)


def test_a_bias_takes_out_the_mean_error() -> None:
    rng = np.random.default_rng(5)
    bias, error = rng.standard_normal(8).astype(np.float32), rng.standard_normal((30, 8)).astype(np.float32) + 1
    found = corrected(bias, error)
    assert found.dtype == np.float32
    assert np.abs((error.astype(float) + found - bias).mean(axis=0)).max() < 1e-6
