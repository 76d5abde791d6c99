"""Numbers of a report as its reader takes them."""

import pytest

from onevision_edge.report.page.numbers import (
    difference,
    figure,
    in_unit,
    interval,
    milliseconds,
    moment,
    nbytes,
    percent,
    rank,
    verdict_text,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.00012, "1.2e-4"),
        (1.4e-7, "1.4e-7"),
        (-0.00012, "−1.2e-4"),
        (0.001, "0.001"),
        (0.01234, "0.0123"),
        (-2.34, "−2.34"),
        (1234.4, "1234"),
    ],
)
def test_figures_have_three_digits_and_a_sign_that_is_seen(value: float | None, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.95, "95.0 %"), (1, "100 %"), (0.99996, "100.00 %"), (0.9987, "99.87 %"), (0, "0.0 %"), (None, "–")],
)
def test_only_all_is_100_percent(value: float | None, text: str) -> None:
    assert percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.34, "12.3 ms"), (60, "60.0 ms"), (107.2, "107 ms"), (0.42, "0.420 ms"), (999.6, "1.00 s"), (61234, "61.2 s")],
)
def test_durations_have_three_digits(value: float, text: str) -> None:
    assert milliseconds(value) == text


def test_units_of_a_record() -> None:
    assert in_unit(0.25, "s") == "250 ms"
    assert in_unit(12.5, "tokens/sec") == "12.5 tokens/s"
    assert in_unit(None, "tokens/sec") == "–"
    assert nbytes(3_910_000) == "3.91 MB"


def test_intervals_and_differences_say_their_unit_once() -> None:
    assert interval("kld", {"value": 0.012, "low": 0.01, "high": 0.0145, "n": 9}) == "0.012 (0.01 to 0.0145)"
    assert interval("accuracy", {"value": 0.95, "low": 0.93, "high": 0.97, "n": 9}) == "95.0 % (93.0 to 97.0 %)"
    assert interval("kld", {"value": 0.012, "low": None, "high": None, "n": 1}) == "0.012"
    assert interval("kld", None) == "–"
    assert difference("accuracy", -0.0028) == "−0.3 points"
    assert difference("kld", 0.0028) == "+0.0028"


def test_a_verdict_is_a_sign_and_a_word() -> None:
    assert [verdict_text(v) for v in ("PASS", "AMBIGUOUS", "FAIL", None)] == ["✓ PASS", "≈ AMBIGUOUS", "✕ FAIL", "–"]
    assert sorted(["FAIL", "PASS", None, "AMBIGUOUS"], key=rank) == ["PASS", None, "AMBIGUOUS", "FAIL"]


def test_a_time_is_given_in_utc_and_what_is_none_as_it_stands() -> None:
    assert moment("2026-11-27T12:30:00+02:00") == "27 November 2026, 10:30 UTC"
    assert moment("yesterday") == "yesterday"
    assert moment(None) == "–"
