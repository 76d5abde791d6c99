"""What the plots of a report share: SVG by hand, its classes coloured by the page, wide as the page is.

A plot that has to fit any width has its x in percent and its y in pixels, so that only its lines are stretched.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ...calibration.axes import linear_ticks, log_ticks
from .numbers import figure

XMLNS = 'xmlns="http://www.w3.org/2000/svg"'


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis from `low` to `high`; of logarithms (base 10) where `log`, zero and below then at its foot."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]  # values and their text
    log: bool = False

    @classmethod
    def logarithmic(cls, values: Sequence[float]) -> "Scale":
        """An axis of divergences or errors; zeros get a tick of their own."""
        (low, high), ticks = log_ticks(values or [1e-3, 1.0])
        return cls(low, high, tuple((tick, figure(tick)) for tick in ticks), log=True)

    @classmethod
    def linear(cls, values: Sequence[float], about: int = 5, floor: float | None = None) -> "Scale":
        """An axis around the values, a tenth of their range to spare; not below `floor`."""
        low, high = min(values), max(values)
        pad = max(0.1 * (high - low), 0.02 * abs(high), 1e-9)
        low = low - pad if floor is None else max(floor, low - pad)
        return cls(low, high + pad, tuple(linear_ticks(low, high + pad, about)))

    def part(self, value: float) -> float:
        """How far along the axis a value is, 0 to 1."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        least = 10**self.low
        return (math.log10(max(value, least)) - self.low) / (self.high - self.low)


def text(kind: str, x: str | float, y: float, words: str, anchor: str = "start", more: str = "") -> str:
    """Words at a place; x in pixels or as "12.5%"."""
    place = x if isinstance(x, str) else f"{x:g}"
    end = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{place}" y="{y:g}"{end}{more}>{escape(words)}</text>'


def line(kind: str, x1: str | float, y1: float, x2: str | float, y2: float) -> str:
    """A line; x in pixels or in percent."""
    ends = [x if isinstance(x, str) else f"{x:g}" for x in (x1, x2)]
    return f'<line class="{kind}" x1="{ends[0]}" y1="{y1:g}" x2="{ends[1]}" y2="{y2:g}"/>'


def title(words: str) -> str:
    """What a pointer that rests on the mark is told."""
    return f"<title>{escape(words)}</title>"


def percents(part: float) -> str:
    """A part of the width: 12.5%."""
    return f"{100 * part:.5g}%"


def image(label: str, attributes: str, body: Iterable[str]) -> str:
    """An SVG element that a screen reader calls `label`."""
    return f'<svg {XMLNS} role="img" aria-label="{escape(label)}" {attributes}>{"".join(body)}</svg>'
