"""Arithmetic of the runs."""

import math
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np

from .client import Reply


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and the largest, in milliseconds; of none: NaN."""
    if not seconds:
        return dict.fromkeys(("p50", "p95", "max"), math.nan)
    values = np.percentile(seconds, (50, 95, 100)) * 1000
    return dict(zip(("p50", "p95", "max"), map(float, values), strict=True))


def latency(replies: Sequence[Reply]) -> dict[str, Any]:
    """Milliseconds to the first piece of text, for each further token, and between pieces as they arrived."""
    answered = [reply for reply in replies if reply.answered]
    return {
        "first": percentiles([reply.first for reply in answered]),
        "token": percentiles([reply.per_token for reply in answered if reply.per_token is not None]),
        "gap": percentiles([gap for reply in answered for gap in reply.gaps]),
    }


def rates(replies: Sequence[Reply], seconds: float) -> dict[str, float]:
    """Answers and tokens a second."""
    answered = [reply for reply in replies if reply.answered]
    return {
        "answers": len(answered) / seconds,
        "tokens": sum(reply.tokens for reply in answered) / seconds,
        "seconds": seconds,
    }


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median, least and most of the rounds."""
    return {"median": median(ratios), "least": min(ratios), "most": max(ratios)}


def slope(minutes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Of the line of least squares, per minute, and the half of its 95 % interval.

    Neighbouring samples of memory are alike, so the interval counts means of twelve blocks, not samples.
    """
    blocks = [block for block in np.array_split(np.arange(len(values)), min(12, len(values))) if len(block)]
    x = np.array([mean(minutes[i] for i in block) for block in blocks])
    y = np.array([mean(values[i] for i in block) for block in blocks])
    if len(x) < 3:
        return math.nan, math.nan
    centred = x - x.mean()
    steepness = float(centred @ y / (centred @ centred))
    rest = y - y.mean() - steepness * centred
    error = math.sqrt(float(rest @ rest) / (len(x) - 2) / float(centred @ centred))
    return steepness, _T95.get(len(x) - 2, 2.0) * error


# Student's t, two-sided 95 %, by degrees of freedom.
_T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23}


def outcome(replies: Sequence[Reply]) -> dict[str, Any]:
    """How many were answered, refused and lost, and the first words on those that were lost."""
    refused = [reply for reply in replies if reply.status in (429, 503)]
    lost = [reply for reply in replies if not reply.answered and reply.status not in (429, 503)]
    return {
        "asked": len(replies),
        "answered": sum(reply.answered for reply in replies),
        "refused": len(refused),
        "lost": len(lost),
        "faults": sorted({f"{reply.status} {reply.question.kind}: {reply.fault}" for reply in lost})[:5],
    }
