"""The axes of a plot of divergence against size, whatever draws it: ranges, ticks, and numbers as text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from unicodedata import east_asian_width

from ..errors import OneVisionError

_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
_LEAST = 1e-12  # a divergence below this counts as zero
_EMPTY = (1e-3, 1.0)  # the range of a log axis on which there is nothing but zeros


@dataclass(frozen=True, slots=True)
class Point:
    """A model of some size, bytes, and its divergence in nats."""

    bytes: int
    divergence: float


@dataclass(frozen=True, slots=True)
class Mark:
    """A model with a name; `chosen` is the one that the plot is about."""

    label: str
    bytes: int
    divergence: float
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Axes:
    """Sizes from left to right, linear; divergences from top to bottom, logarithmic, with zero at the floor."""

    sizes: tuple[float, float]
    logs: tuple[float, float]  # of the divergence, base 10
    divergences: tuple[float, ...]  # that have a tick
    budget_bytes: int | None = None
    budget_divergence: float | None = None

    @classmethod
    def around(
        cls, points: Sequence[Point | Mark], budget_bytes: int | None = None, budget_divergence: float | None = None
    ) -> "Axes":
        """Axes that hold the points, and the budgets unless they are so far off that the points would shrink.

        Raises OneVisionError where there is no point, or a divergence is not finite.
        """
        _check(points)
        sizes, divergences = [p.bytes for p in points], [p.divergence for p in points]
        near_size = None if budget_bytes is None or budget_bytes > 1.5 * max(sizes) else budget_bytes
        near = None if budget_divergence is None or not _near(budget_divergence, divergences) else budget_divergence
        span = padded(sizes + ([] if near_size is None else [near_size]))
        logs, ticks = log_ticks(divergences + ([] if near is None else [near]))
        return cls(span, logs, tuple(ticks), near_size, near)

    @property
    def unit(self) -> str:
        """What sizes are counted in: GB, MB, kB."""
        return unit_of(self.sizes[1])[0]

    @property
    def size_ticks(self) -> list[tuple[float, str]]:
        """Fractions of the axis from the left, and the sizes there, in `unit`."""
        scale = unit_of(self.sizes[1])[1]
        ticks = linear_ticks(self.sizes[0] / scale, self.sizes[1] / scale)
        return [(self.across(tick * scale), text) for tick, text in ticks]

    @property
    def divergence_ticks(self) -> list[tuple[float, str]]:
        """Fractions of the axis from the top, and the divergences there."""
        return [(self.down(tick), number(tick)) for tick in self.divergences]

    def at(self, point: Point | Mark) -> tuple[float, float]:
        """Where a point is, in fractions of the axes from the left and from the top."""
        return self.across(point.bytes), self.down(point.divergence)

    def across(self, size: float) -> float:
        """Where a size is, from the left."""
        return _part(size, self.sizes)

    def down(self, divergence: float) -> float:
        """Where a divergence is, from the top; zero is at the floor."""
        return 1 - _part(math.log10(divergence) if divergence >= _LEAST else self.logs[0], self.logs)


def _check(points: Sequence[Point | Mark]) -> None:
    if not points:
        raise OneVisionError("there is nothing to plot: give a frontier or a mark")
    for point in points:
        if not point.divergence < math.inf:
            raise OneVisionError(
                f"a model of {size(point.bytes)} diverges by {point.divergence} nats, which is no place on a plot: "
                f"leave it out"
            )


def _near(budget: float, divergences: Sequence[float]) -> bool:
    """Whether a budget is within a hundredfold of the divergences, zeros apart."""
    positive = [d for d in divergences if d >= _LEAST] or list(_EMPTY)
    return min(positive) / 100 <= budget <= 100 * max(positive)


def _part(value: float, span: tuple[float, float]) -> float:
    """How far along the span a value is, 0 to 1."""
    return (value - span[0]) / (span[1] - span[0])


def padded(sizes: Sequence[int]) -> tuple[float, float]:
    """From a little below the smallest, but not below zero, to a little above the largest."""
    low, high = min(sizes), max(sizes)
    pad = max(0.05 * (high - low), 0.01 * high, 1.0)
    return max(0.0, low - pad), high + pad


def linear_ticks(low: float, high: float, about: int = 6) -> list[tuple[float, str]]:
    """Round numbers from low to high, 1, 2, 2.5 or 5 times a power of ten apart, with as many decimals as they need."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    decimals = next((d for d in range(12) if abs(round(step, d) - step) < 1e-6 * step), 12)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, f"{i * step:.{decimals}f}") for i in range(first, last + 1)]


def log_ticks(divergences: Sequence[float]) -> tuple[tuple[float, float], list[float]]:
    """The ends of the axis, as logarithms, and its ticks: 1, 2 and 5 times powers of ten; over a wide range, powers.

    Zeros get a floor of their own, a tick of 0 below the others.
    """
    positive = [d for d in divergences if d >= _LEAST] or list(_EMPTY)
    powers = range(math.floor(math.log10(min(positive))) - 1, math.ceil(math.log10(max(positive))) + 2)
    all_ticks = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    low = max(t for t in all_ticks if t <= min(positive))
    high = min(t for t in all_ticks if t >= max(positive) and t > low)
    ticks = [t for t in all_ticks if low <= t <= high]
    if high / low > 200:
        every = math.ceil(math.log10(high / low) / 10)
        ticks = [float(f"1e{power}") for power in powers if low <= float(f"1e{power}") <= high and power % every == 0]
    bottom, top = math.log10(low), math.log10(high)
    pad = 0.04 * (top - bottom)
    if min(divergences) >= _LEAST:
        return (bottom - pad, top + pad), ticks
    return (bottom - max(0.3, 3 * pad), top + pad), [0.0, *ticks]


def number(value: float, digits: int = 3) -> str:
    """Up to so many digits: 0.0123, 4.5e-6, 0."""
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def size(count: float, digits: int = 3) -> str:
    """Bytes, up to so many digits: 4.56 GB, 789 MB."""
    unit, scale = unit_of(count)
    return f"{number(count / scale, max(digits, len(str(round(abs(count) / scale)))))} {unit}"


def unit_of(count: float) -> tuple[str, float]:
    """The unit for a count of bytes, and what it stands for; 999.6 MB, which would round to 1000, is 1 GB."""
    return next(((unit, scale) for unit, scale in _UNITS if abs(count) >= 0.9995 * scale), _UNITS[-1])


def printable(text: str, columns: int) -> str:
    """A name as a terminal and XML can take it: nothing but what prints, shortened to so many columns."""
    clean = "".join(c if c.isprintable() else "�" for c in text)
    if text_width(clean) <= columns:
        return clean
    while clean and text_width(clean) > columns - 1:
        clean = clean[:-1]
    return clean + "…"


def text_width(text: str) -> int:
    """Columns of a terminal: two for a wide character."""
    return sum(2 if east_asian_width(c) in "WF" else 1 for c in text)
