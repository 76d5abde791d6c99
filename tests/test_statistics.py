"""Statistics of activations: sums against float64, a sample that is fair and the same however rows come."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onevision_edge.calibration import statistics
from onevision_edge.calibration.statistics import Statistics
from onevision_edge.errors import OneVisionError


def rows(count: int, channels: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, channels)).astype(np.float32)


def seen(x: np.ndarray, cuts: list[int], **options: int) -> Statistics:
    """Statistics of rows that come in pieces, cut at so many places."""
    found = Statistics(x.shape[1], len(x), options.get("samples", 16), options.get("seed", 1), with_gram=True)
    for start, stop in pairwise([0, *sorted(cuts), len(x)]):
        found.update(x[start:stop])
    return found


def test_sums_against_float64() -> None:
    x = rows(300)
    found, exact = seen(x, [10, 11, 200]), x.astype(float)
    assert found.rows == 300
    np.testing.assert_array_equal(found.absmax, np.abs(x).max(axis=0))
    np.testing.assert_allclose(found.mean_magnitude(), np.abs(exact).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.mean_square(), np.square(exact).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.gram, exact.T @ exact, rtol=1e-5, atol=1e-4)
    assert Statistics(5, 300, 16, 1).gram is None


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 80), st.lists(st.integers(0, 80), max_size=6), st.integers(1, 30), st.integers(1, 7))
def test_products_are_of_many_rows_and_of_slabs(count: int, cuts: list[int], gathered: int, slab: int) -> None:
    """Whatever pieces rows come in, the same bits; nothing is left out at the end."""
    x = rows(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_ROWS", gathered)
        patch.setattr(statistics, "_SLAB", slab)
        pieces, whole = seen(x, [min(cut, count) for cut in cuts]), seen(x, [])
    assert pieces.gram is not None
    np.testing.assert_array_equal(pieces.gram, whole.gram)
    np.testing.assert_array_equal(pieces.gram, pieces.gram.T)
    np.testing.assert_allclose(pieces.gram, x.T.astype(float) @ x, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 80), st.lists(st.integers(0, 80), max_size=6), st.integers(0, 9))
def test_the_sample_does_not_depend_on_the_pieces(count: int, cuts: list[int], seed: int) -> None:
    x = rows(count)
    pieces, whole = seen(x, [min(cut, count) for cut in cuts], seed=seed), seen(x, [], seed=seed)
    np.testing.assert_array_equal(pieces.sample, whole.sample)
    assert pieces.sample.shape == (min(16, count), 5)
    places = [np.flatnonzero((x == row).all(axis=1))[0] for row in pieces.sample]
    assert (np.diff(places) > 0).all()  # rows of x, in their order, none twice
    if count <= 16:
        np.testing.assert_array_equal(pieces.sample, x)


def test_every_row_has_the_same_chance() -> None:
    x = np.arange(40, dtype=np.float32)[:, None]
    counts = np.bincount(np.concatenate([seen(x, [], seed=i).sample[:, 0].astype(int) for i in range(400)]))
    assert abs(counts - 160).max() < 5 * np.sqrt(400 * 0.4 * 0.6)  # binomial: 400 draws of 16 from 40


def test_rows_of_any_shape_are_rows_of_channels() -> None:
    x = rows(24)
    found = Statistics(5, 24, 24, 0)
    found.update(x[:12].reshape(1, 3, 4, 5))
    found.update(x[12:])
    np.testing.assert_array_equal(found.sample, x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    x = rows(4)
    x[2, 3] = bad
    with pytest.raises(OneVisionError, match=r"the input of model\.layers\.3\.mlp\.down_proj reaches NaN or infinity"):
        Statistics(5, 4, 4, 0).update(x, "model.layers.3.mlp.down_proj")
