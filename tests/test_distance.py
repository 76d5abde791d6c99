"""Distances against first principles."""

import math

import numpy as np
import pytest

from onevision_edge.report.parity.distance import DistanceTally


def test_numbers_of_two_rows() -> None:
    wanted = np.array([[3.0, 4.0], [1000.0, 0.0]], np.float32)
    tally = DistanceTally()
    tally.add(wanted, wanted + np.array([[0.3, 0.4], [0.0, 10.0]], np.float32), "row")
    found = tally.distance()
    assert found is not None
    assert found.max_abs == pytest.approx(10)
    assert found.mean_abs == pytest.approx(10.7 / 4)
    assert found.relative_l2 == pytest.approx(math.sqrt((0.1**2 + 0.01**2) / 2), rel=1e-5)
    assert found.snr_db == pytest.approx(-20 * math.log10(found.relative_l2))
    assert found.cosine == pytest.approx((1 + 1000 / math.hypot(1000, 10)) / 2)
    assert tally.worst is not None
    assert tally.worst.to_dict() == {"row": "row", "position": 0, "phase": "prefill"}


def test_a_huge_row_hides_nothing_of_the_others() -> None:
    wanted = np.ones((10, 4), np.float32)
    wanted[0] = 1e6
    got = wanted.copy()
    got[5] = -1
    tally = DistanceTally()
    tally.add(wanted, got, "row")
    assert tally.distance().relative_l2 == pytest.approx(2 / math.sqrt(10))


def test_the_worse_of_both_phases_counts() -> None:
    wanted = np.ones((100, 4), np.float32)
    got = wanted.copy()
    got[99] = 1.5
    whole, split = DistanceTally(), DistanceTally()
    whole.add(wanted, got, "row")
    split.add(wanted[:98], got[:98], "row", 0, decode_from=98)
    split.add(wanted[98:], got[98:], "row", 98, decode_from=98)
    assert whole.distance().relative_l2 == pytest.approx(0.05)
    assert split.distance().relative_l2 == pytest.approx(0.5 / math.sqrt(2))
    assert split.worst.to_dict() == {"row": "row", "position": 99, "phase": "decode"}


def test_pieces_add_up() -> None:
    rng = np.random.default_rng(0)
    wanted, got = rng.normal(size=(2, 64, 8)).astype(np.float32)
    whole, pieces = DistanceTally(), DistanceTally()
    whole.add(wanted, got, "row")
    for start in range(0, 64, 5):
        pieces.add(wanted[start : start + 5], got[start : start + 5], "row", start)
    assert whole.distance().to_dict() == pytest.approx(pieces.distance().to_dict())
    assert whole.worst == pieces.worst


def test_equal_values_are_exact_zeros_among_them() -> None:
    tally = DistanceTally()
    tally.add(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), "row")
    assert tally.distance().to_dict() == {"max_abs": 0, "mean_abs": 0, "relative_l2": 0, "cosine": 1, "snr_db": None}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_told_as_none(bad: float) -> None:
    tally = DistanceTally()
    tally.add(np.ones((2, 2)), np.array([[1, bad], [1, 1]]), "row")
    tally.add(np.ones((2, 2)), np.ones((2, 2)), "row")
    assert tally.distance().to_dict()["relative_l2"] is None
    assert tally.distance().to_dict()["max_abs"] is None


def test_shapes_that_differ_cannot_be_compared() -> None:
    tally = DistanceTally()
    tally.differ("row", 7)
    assert tally.distance().to_dict()["relative_l2"] is None
    assert tally.worst.position == 7


def test_nothing_compared() -> None:
    assert DistanceTally().distance() is None
