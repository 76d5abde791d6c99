"""How far what a stage gives lies from the reference's."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

PREFILL, DECODE = "prefill", "decode"
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Distance:
    """Over all values: the largest and the mean absolute error. Over all rows (patches, tokens), each by itself:

    relative_l2: the root mean square of |error| / |reference|, so that a few rows with huge values, which language
    models have at their first token, hide nothing of the others, and of prefill and decoding the worse, so that many
    tokens of a prompt hide nothing of an answer's; cosine: the mean of theirs; snr_db: relative_l2 in decibels, None
    where it is 0.
    """

    max_abs: float
    mean_abs: float
    relative_l2: float
    cosine: float
    snr_db: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record; what is not finite is None."""
        return {name: value if value is None or math.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the relative error is largest: a row of the data, a row of its stream, and the phase that made it."""

    row: str
    position: int
    phase: str
    relative: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        return {"row": self.row, "position": self.position, "phase": self.phase}


@dataclass(slots=True)
class DistanceTally:
    """Adds up what is compared, piece by piece."""

    values: int = 0
    rows: int = 0
    worst: Place | None = None
    _largest: float = 0.0
    _absolute: float = 0.0
    _squares: dict[str, float] = field(default_factory=lambda: {PREFILL: 0.0, DECODE: 0.0})  # of relative errors
    _counts: dict[str, int] = field(default_factory=lambda: {PREFILL: 0, DECODE: 0})
    _cosines: float = 0.0
    _finite: bool = field(default=True)

    def add(
        self, reference: np.ndarray, found: np.ndarray, row: str, first: int = 0, decode_from: int = 1 << 62
    ) -> None:
        """Compare rows [n, width] of a stream, the first at position `first`; from decode_from on by decoding."""
        wanted, got = reference.astype(np.float64), found.astype(np.float64)
        self._finite = self._finite and bool(np.isfinite(got).all())
        error = np.abs(got - wanted)
        self.values, self.rows = self.values + error.size, self.rows + len(error)
        if not error.size or not self._finite:
            return
        self._largest = max(self._largest, float(error.max()))
        self._absolute += float(error.sum())
        norms = np.sqrt(np.square(wanted).sum(axis=1))
        relative = np.sqrt(np.square(error).sum(axis=1)) / np.maximum(norms, _TINY)
        relative[(norms == 0) & ~error.any(axis=1)] = 0
        begun = min(max(decode_from - first, 0), len(relative))
        for phase, part in ((PREFILL, relative[:begun]), (DECODE, relative[begun:])):
            self._squares[phase] += float(np.square(part).sum())
            self._counts[phase] += len(part)
        self._cosines += float(_cosine(wanted, got, norms).sum())
        at = int(relative.argmax())
        if self.worst is None or relative[at] > self.worst.relative:
            self.worst = Place(row, first + at, PREFILL if at < begun else DECODE, float(relative[at]))

    def differ(self, row: str, position: int) -> None:
        """Note that a row's values cannot be compared: other shapes, or other ids."""
        self._finite, self.rows = False, self.rows + 1
        self.worst = Place(row, position, PREFILL, math.inf)

    def distance(self) -> Distance | None:
        """All so far; None where nothing was compared. A value that is not finite makes all of it infinite."""
        if not self.rows:
            return None
        if not self._finite:
            return Distance(math.inf, math.inf, math.inf, 0.0, -math.inf)
        relative = max(math.sqrt(self._squares[phase] / max(count, 1)) for phase, count in self._counts.items())
        snr = -20 * math.log10(relative) if relative > 0 else None
        return Distance(self._largest, self._absolute / self.values, relative, self._cosines / self.rows, snr)


def _cosine(wanted: np.ndarray, got: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Of every row; 1 where both are the same."""
    lengths = norms * np.sqrt(np.square(got).sum(axis=1))
    cosine = (wanted * got).sum(axis=1) / np.maximum(lengths, _TINY)
    return np.where((wanted == got).all(axis=1), 1.0, np.minimum(cosine, 1.0))
