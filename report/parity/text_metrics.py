"""Scores of one answer's text against the accepted ones: where there are several, the nearest counts."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import ModuleType

from ...errors import OneVisionError
from .metrics import METRICS

__all__ = ["METRICS", "anls", "cer", "choice", "exact", "normalized", "score", "wer"]

_STATED = re.compile(r"\b(?:answer|option|choice)\b(?:\s+is)?\s*[:=]?\s*\(?([A-Za-z])(?![A-Za-z])", re.IGNORECASE)
_MARKED = re.compile(r"^\W*([A-Za-z])(?:\s*[).:,\]]|\s*$)")


def normalized(text: str) -> str:
    """Text as it is compared: NFKC, lower case, runs of white space as one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact(answer: str, expected: Sequence[str]) -> float:
    """1 where the answer equals an accepted one, both normalised, a full stop at the end aside; else 0."""
    return float(_plain(answer) in {_plain(text) for text in expected})


def anls(answer: str, expected: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity, 0 where the distance is `threshold` or more.

    The mean over questions is ANLS. Source: Biten et al., Scene Text Visual Question Answering (ICCV 2019),
    equation 1: s = 1 - NL where NL < 0.5, else 0.
    """
    distances = [_distance(normalized(answer), normalized(text)) for text in expected]
    nearest = min(distances, default=1.0)
    return 1 - nearest if nearest < threshold else 0.0


def cer(answer: str, expected: Sequence[str]) -> float:
    """Character error rate against the nearest accepted answer, by jiwer, case counting; it may exceed 1."""
    return _error_rate(_jiwer().cer, answer, expected)


def wer(answer: str, expected: Sequence[str]) -> float:
    """Word error rate against the nearest accepted answer, by jiwer, case counting; it may exceed 1."""
    return _error_rate(_jiwer().wer, answer, expected)


def choice(answer: str, options: Sequence[str] = ()) -> str | None:
    """The letter that a multiple choice answer picks, A to Z, or None where none is clear.

    In this order: "the answer is B", "B." or "(B)" or "B" at the start, the text of exactly one of the options.
    options: their texts in the order of letters; without any, every letter counts.
    """
    last = chr(ord("A") + len(options) - 1) if options else "Z"
    for pattern in (_MARKED, _STATED):
        found = pattern.search(answer.strip())
        if found and found[1].upper() <= last:
            return found[1].upper()
    plain = _plain(answer)
    named = [i for i, text in enumerate(options) if _plain(text) == plain]
    return chr(ord("A") + named[0]) if len(named) == 1 else None


def score(answer: str, expected: Sequence[str], options: Sequence[str] = ()) -> dict[str, float]:
    """Every score of METRICS that an answer can have, by name; cer and wer where jiwer is installed.

    choice is there where the row has options, whose letter or text is expected, or where a capital letter is expected.
    """
    if not expected:
        return {}
    found = {"accuracy": exact(answer, expected), "anls": anls(answer, expected)}
    if find_spec("jiwer"):
        found |= {"cer": cer(answer, expected), "wer": wer(answer, expected)}
    if options or all(re.fullmatch("[A-Z]", text) for text in expected):
        right = {choice(text, options) for text in expected} - {None}
        found["choice"] = float(choice(answer, options) in right)
    return found


def _plain(text: str) -> str:
    return normalized(text).removesuffix(".").rstrip()


def _distance(left: str, right: str) -> float:
    """Levenshtein distance over the longer one's length, 0 to 1."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1] / max(len(left), len(right), 1)


def _error_rate(rate: Callable[[str, str], float], answer: str, expected: Sequence[str]) -> float:
    hypothesis = _spaced(answer)
    rates = [float(rate(_spaced(text), hypothesis)) for text in expected if text.strip()]
    if len(rates) < len(expected):  # an accepted answer is empty: jiwer refuses it, and every character is wrong
        rates.append(float(bool(hypothesis)))
    if not rates:
        raise OneVisionError("an error rate needs at least one accepted answer")
    return min(rates)


def _spaced(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _jiwer() -> ModuleType:
    try:
        import jiwer
    except ImportError as error:
        raise OneVisionError(
            "character and word error rates need jiwer: install onevision-edge[report], or leave these metrics out"
        ) from error
    return jiwer
