"""Scores of texts against distances written out and the papers' definitions."""

import builtins
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onevision_edge.errors import OneVisionError
from onevision_edge.report.parity.metrics import METRICS
from onevision_edge.report.parity.text_metrics import anls, cer, choice, exact, normalized, score, wer


@pytest.mark.parametrize(
    ("answer", "expected", "wanted"),
    [
        ("3", ["3"], 1),
        (" Three \n digits.", ["three digits"], 1),
        ("ＡＢ①", ["ab1"], 1),
        ("4", ["3", "4"], 1),
        ("34", ["3", "4"], 0),
        ("", ["3"], 0),
        (".5", ["5"], 0),
        ("3", [], 0),
    ],
)
def test_exact(answer: str, expected: list[str], wanted: float) -> None:
    assert exact(answer, expected) == wanted


@pytest.mark.parametrize(
    ("answer", "expected", "wanted"),
    [
        ("hello", ["hello"], 1),
        ("HELLO ", ["hello"], 1),
        ("hallo", ["hello"], 0.8),
        ("helo", ["hello"], 0.8),
        ("ab", ["cb"], 0),  # a distance of one half is too far
        ("abc", ["abd"], 2 / 3),
        ("hallo", ["goodbye", "hullo", "xallo!"], 0.8),
        ("", [""], 1),
        ("", ["a"], 0),
    ],
)
def test_anls(answer: str, expected: list[str], wanted: float) -> None:
    assert anls(answer, expected) == pytest.approx(wanted)


@given(st.text("ab c", max_size=12), st.text("ab c", max_size=12))
def test_anls_is_symmetric_and_1_for_equals_alone(left: str, right: str) -> None:
    assert anls(left, [right]) == pytest.approx(anls(right, [left]))
    assert (anls(left, [right]) == 1) == (normalized(left) == normalized(right))


def test_error_rates() -> None:
    assert cer("hallo", ["hello"]) == 0.2
    assert cer("Hello", ["hello"]) == 0.2
    assert wer("the cat sat", ["the cat sat down"]) == 0.25
    assert wer("a  b", ["a b"]) == 0
    assert cer("hallo hallo", ["x", "hallo"]) == pytest.approx(6 / 5)
    assert cer("", ["abc"]) == 1
    assert (cer("", [""]), cer("a", [""])) == (0, 1)


def test_without_jiwer_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "jiwer":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OneVisionError, match=r"onevision-edge\[report\]"):
        cer("a", ["a"])


@pytest.mark.parametrize(
    ("answer", "options", "wanted"),
    [
        ("B", (), "B"),
        ("b.", (), "B"),
        ("(C) the dog", (), "C"),
        ("D: all of them", ("w", "x", "y", "z"), "D"),
        ("D", ("w", "x"), None),
        ("The answer is B.", (), "B"),
        ("Answer: (c)", (), "C"),
        ("A cat sits on it", ("a cat", "a dog"), None),
        ("A dog.", ("a cat", "a dog"), "B"),
        ("same", ("same", "same"), None),
        ("the answer is unclear", (), None),
        ("", (), None),
        ("I think so", (), None),
    ],
)
def test_choice(answer: str, options: Sequence[str], wanted: str | None) -> None:
    assert choice(answer, options) == wanted


def test_score_has_what_the_row_allows() -> None:
    assert score("hallo", ["hello"]) == {"accuracy": 0, "anls": 0.8, "cer": 0.2, "wer": 1}
    assert score("The answer is B", ["B"])["choice"] == 1
    assert score("a dog", ["B"], ("a cat", "a dog"))["choice"] == 1
    assert score("A", ["a dog"], ("a cat", "a dog"))["choice"] == 0
    assert "choice" not in score("B", ["b"])
    assert score("anything", []) == {}


def test_every_score_is_in_the_table() -> None:
    found = score("A", ["A"])
    assert found.keys() < METRICS.keys()
    for name, value in found.items():
        assert value == (1 if METRICS[name].higher_is_better else 0)
        assert METRICS[f"{name}_reference"].higher_is_better is None
    assert not math.isnan(sum(found.values()))
