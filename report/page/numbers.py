"""Numbers as a reader takes them: 1.23e-4, 95.0 %, 3.9 MB, 12.3 ms, and what each metric is called."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from ...calibration.axes import number, size
from ..parity.judging import AMBIGUOUS, FAIL, PASS
from ..parity.metrics import METRICS

NONE = "–"  # what was not measured
MINUS = "−"
SIGNS = {PASS: "✓", AMBIGUOUS: "≈", FAIL: "✕"}
_RANKS = {PASS: 0, AMBIGUOUS: 1, FAIL: 2}
_MILLISECONDS = {"ms": 1.0, "s": 1e3, "sec": 1e3, "seconds": 1e3, "us": 1e-3, "µs": 1e-3}


LABELS = {
    "kld": "KL divergence",
    "kld_p99": "KL divergence, 99th percentile",
    "top1_agreement": "same likeliest token",
    "top5_agreement": "likeliest token among five",
    "first_divergent_token": "tokens before the first that differs",
    "divergent_tokens": "tokens that differ",
    "exact_match": "same answer as the reference",
    "accuracy": "right answers",
    "anls": "ANLS",
    "choice": "right choices",
    "cer": "character error rate",
    "wer": "word error rate",
    "inter_token_latency": "time per token",
    "request_latency": "whole request",
    "output_token_throughput": "tokens a second",
    "output_token_throughput_per_user": "tokens a second, per user",
    "request_throughput": "requests a second",
}
_DROP = "_drop"  # a gate on how much worse a score may be


def label(name: str) -> str:
    """What a metric or a gate of a record is called; one that is not known keeps its name."""
    stem = name.removesuffix(_DROP)
    return LABELS.get(stem, stem.replace("_", " ")) + (", change" if stem != name else "")


def unit(name: str) -> str:
    """The unit of a metric: share, nats, tokens or none."""
    found = METRICS.get(name.removesuffix(_DROP))
    return found.unit if found else ""


def labelled(name: str) -> str:
    """What a metric is called, with nats where it is in nats."""
    return f"{label(name)}, nats" if unit(name) == "nats" else label(name)


def is_share(name: str) -> bool:
    """Whether a metric is a fraction, which reads in percent."""
    return unit(name) == "share"


def more_is_better(name: str) -> bool:
    """Whether more of a metric is better."""
    return name in METRICS and METRICS[name].higher_is_better is True


def metric_value(name: str, value: float | None) -> str:
    """A value of a metric, without its unit unless that is percent."""
    return percent(value) if is_share(name) else figure(value)


def difference(name: str, value: float | None) -> str:
    """A difference of two values of a metric, with its sign; of fractions, in points of a hundred."""
    if value is None:
        return NONE
    text = f"{100 * abs(value):.1f} points" if is_share(name) else figure(abs(value))
    return (MINUS if value < 0 else "+" if value > 0 else "") + text


def interval(name: str, given: Mapping[str, Any] | None) -> str:
    """A value and its 95 % interval: 0.0123 (0.01 to 0.015)."""
    if not given or given.get("value") is None:
        return NONE
    text = metric_value(name, given["value"])
    low, high = given.get("low"), given.get("high")
    if low is None or high is None:
        return text
    return f"{text} ({metric_value(name, low).removesuffix(' %')} to {metric_value(name, high)})"


def figure(value: float | None) -> str:
    """Three digits: 0.0123, 12.3, 1234, and 1.23e-4 below a thousandth."""
    if value is None:
        return NONE
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", MINUS, int(value < 0))
    text = f"{value:.0f}" if 1000 <= abs(value) < 1e6 else number(value)
    return MINUS + text[1:] if value < 0 else text


def percent(value: float | None) -> str:
    """A fraction in percent: 95.0 %, and near all of it 99.97 %; 100 % is all."""
    if value is None:
        return NONE
    return "100 %" if value == 1 else f"{100 * value:.{2 if 0.99 <= value < 1 else 1}f} %"


def nbytes(value: float | None) -> str:
    """Bytes: 3.9 MB."""
    return NONE if value is None else size(value)


def milliseconds(value: float | None) -> str:
    """Milliseconds, or seconds from a thousand on: 0.42 ms, 12.3 ms, 1.23 s."""
    if value is None:
        return NONE
    scaled, unit = (value / 1e3, "s") if abs(value) >= 999.5 else (value, "ms")
    text = f"{scaled:#.3g}".rstrip(".") if 1e-3 <= abs(scaled) < 1000 else figure(scaled)
    return f"{text} {unit}"


def in_unit(value: float | None, given: str) -> str:
    """A value in a unit of a record: durations as `milliseconds`, tokens/sec as a rate."""
    if value is None or given in _MILLISECONDS:
        return milliseconds(value if value is None else value * _MILLISECONDS[given])
    return f"{figure(value)} {given.replace('/sec', '/s')}".strip()


def in_milliseconds(value: float, given: str) -> float:
    """A duration in a unit of a record, in ms."""
    return value * _MILLISECONDS.get(given, 1.0)


def moment(text: str | None) -> str:
    """A time of a record as its reader says it: 27 November 2026, 10:00 UTC."""
    try:
        when = datetime.fromisoformat(text or "").astimezone(UTC)
    except ValueError:
        return text or NONE
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def verdict_text(verdict: str | None) -> str:
    """A verdict's sign and word, so that it is never colour alone."""
    return f"{SIGNS[verdict]} {verdict}" if verdict in SIGNS else verdict or NONE


def rank(verdict: str | None) -> int:
    """0 for PASS, 1 for AMBIGUOUS, 2 for FAIL; what is unknown counts as PASS."""
    return _RANKS.get(verdict or PASS, 0)


def plural(count: int, noun: str) -> str:
    """A count and its noun: 1 row, 3 rows."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
