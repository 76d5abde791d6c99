"""The frontier plots of a report: divergence and right answers against size and latency, from both records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...calibration.axes import unit_of
from .numbers import in_milliseconds, label, labelled, metric_value, milliseconds, more_is_better, nbytes
from .plots import Scale
from .plots_frontier import Axis, Mark, frontier_plot
from .tables import measured, worth

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Figures:
    """The plots of one metric, one for each cost."""

    metric: str
    label: str
    plots: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Cost:
    """What is paid: of a subject's description and its speeds; None where it was not measured."""

    label: str
    of: Callable[[Record, Record | None], float | None]
    words: Callable[[float | None], str]


def _timed(key: str) -> Callable[[Record, Record | None], float | None]:
    def of(subject: Record, speed: Record | None) -> float | None:
        value = measured(speed, key, "p50")
        return None if value is None else in_milliseconds(value, measured(speed, key, "unit") or "ms")

    return of


_COSTS = (
    _Cost("size", lambda subject, speed: subject.get("bytes"), nbytes),
    _Cost("first token, ms", _timed("time_to_first_token"), milliseconds),
    _Cost("time per token, ms", _timed("inter_token_latency"), milliseconds),
)


def frontiers(parity: Record, speeds: Mapping[str, Record]) -> list[Figures]:
    """For KL divergence and for what the models are worth, those plots for which two models or more were measured."""
    names = ["kld", worth(parity)]
    found = [_figures(parity, speeds, name) for name in dict.fromkeys(names) if name]
    return [figures for figures in found if figures.plots]


def _figures(parity: Record, speeds: Mapping[str, Record], name: str) -> Figures:
    plots = [_plot(parity, speeds, name, cost) for cost in _COSTS]
    words = label(name)
    return Figures(name, words[:1].upper() + words[1:], tuple(plot for plot in plots if plot))


def _plot(parity: Record, speeds: Mapping[str, Record], name: str, cost: _Cost) -> str:
    marks = _marks(parity, speeds, name, cost)
    if len(marks) < 2:
        return ""
    more = more_is_better(name)
    values = [mark.y for mark in marks]
    scale = _shares(values) if more else Scale.logarithmic(values)
    return frontier_plot(
        marks,
        _cost_axis([mark.x for mark in marks], cost),
        Axis(labelled(name), scale, more),
    )


def _marks(parity: Record, speeds: Mapping[str, Record], name: str, cost: _Cost) -> list[Mark]:
    sides = [
        (c["subject"], measured(c, "metrics", name), c.get("verdict") or "") for c in parity.get("candidates") or ()
    ]
    marks = [
        _mark(subject, given, verdict, name, cost.of(subject, speeds.get(subject["name"])), cost)
        for subject, given, verdict in sides
    ]
    return [mark for mark in (_reference(parity, speeds, name, cost), *marks) if mark is not None]


def _mark(
    subject: Record, given: Record | None, verdict: str | None, name: str, x: float | None, cost: _Cost
) -> Mark | None:
    y = measured(given, "value")
    if x is None or y is None or given is None:
        return None
    words = f"{cost.words(x)}, {metric_value(name, y)}"
    return Mark(subject["name"], x, y, words, verdict, given.get("low"), given.get("high"))


def _reference(parity: Record, speeds: Mapping[str, Record], name: str, cost: _Cost) -> Mark | None:
    """The reference: no divergence, and the value that its answers have."""
    subject = parity.get("reference")
    if not subject:
        return None
    candidates = parity.get("candidates") or ()
    values = (measured(c, "metrics", f"{name}_reference") for c in candidates)
    given = {"value": 0.0} if name == "kld" else next((v for v in values if v), None)
    return _mark(subject, given, None, name, cost.of(subject, speeds.get(subject["name"])), cost)


def _cost_axis(values: Sequence[float], cost: _Cost) -> Axis:
    """Sizes in the unit of the largest; the ticks of times are plain numbers."""
    if cost.label != "size":
        return Axis(cost.label, Scale.linear(values, floor=0.0))
    unit, scale = unit_of(max(values))
    span = Scale.linear([value / scale for value in values], floor=0.0)
    ticks = tuple((tick * scale, words) for tick, words in span.ticks)
    return Axis(f"size, {unit}", Scale(span.low * scale, span.high * scale, ticks))


def _shares(values: Sequence[float]) -> Scale:
    """Fractions, in percent."""
    span = Scale.linear([100 * value for value in values], floor=0.0)
    return Scale(span.low / 100, span.high / 100, tuple((tick / 100, f"{words} %") for tick, words in span.ticks))
