"""Observers: what magnitude of an activation the extreme codes of a symmetric quantiser should stand for, its clip.

Activations stream by; what stays is the largest magnitude and, except for `absmax`, a histogram of |x|. Its range is
always the power of two above the largest magnitude, so that a range that grows merges whole bins: counts, and with
them every clip, are exactly the same in whatever order and pieces the values come.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from ..errors import OneVisionError
from ..precision.codes import FP4, FP8, INT4, INT8, Codes
from .clips import BINS, Clip, Histogram, entropy_clip, mse_clip, percentile_clip

KINDS = ("absmax", "percentile", "entropy", "mse")
_CODES = {codes.name: codes for codes in (INT8, INT4, FP8, FP4)}
_LOWEST = -100  # exponent of the smallest range: with it, numbers of bins are exact in float32
_PIECE = 1 << 16  # values worked on at a time: they stay in the processor's cache


class Observer(Protocol):
    """Statistics of an activation, per tensor or per channel, and the clip they lead to."""

    def update(self, x: np.ndarray) -> None:
        """Take more of it: float32 or float16 [..., channels].

        Raises OneVisionError for NaN and infinity, and for another number of channels; what was seen before stays.
        """

    def largest(self) -> np.ndarray:
        """The magnitude that becomes `codes.reach[1]`: float32 [], or [channels]. Zero where all was zero.

        Raises OneVisionError before the first value.
        """

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`; `restore` makes an observer of it that goes on with identical results."""


@dataclass(eq=False)
class Absmax:
    """The largest |x|: clips nothing."""

    kind: str
    codes: Codes
    channels: int | None
    percentile: float
    rows: int = 0  # values seen, of each channel
    absmax: np.ndarray = field(init=False)  # float32 [channels or 1]

    def __post_init__(self) -> None:
        self.absmax = np.zeros(1 if self.channels is None else self.channels, np.float32)

    def update(self, x: np.ndarray) -> None:
        """See Observer."""
        rows = self._as_rows(x)
        absmax = self.absmax.copy()
        for piece in _magnitudes(rows):
            np.maximum(absmax, piece.max(axis=0), out=absmax)
        if not np.isfinite(absmax).all():
            raise OneVisionError("the activations contain NaN or infinity")
        self._count(rows, absmax)
        self.absmax = absmax
        self.rows += len(rows)

    def largest(self) -> np.ndarray:
        """See Observer."""
        if not self.rows:
            raise OneVisionError("no activations were seen: give the observer some before asking for their clip")
        return self._clip().reshape(() if self.channels is None else -1)

    def state(self) -> dict[str, np.ndarray]:
        """See Observer."""
        names = {"kind": np.array(self.kind), "codes": np.array(self.codes.name)}
        channels = np.array(-1 if self.channels is None else self.channels)
        numbers = {"channels": channels, "percentile": np.array(self.percentile), "rows": np.array(self.rows)}
        return {**names, **numbers, **{name: array.copy() for name, array in self._arrays().items()}}

    def _as_rows(self, x: np.ndarray) -> np.ndarray:
        if self.channels is None:
            return x.reshape(-1, 1)
        if x.ndim == 0 or x.shape[-1] != self.channels:
            raise OneVisionError(f"activations of shape {list(x.shape)} do not end in {self.channels} channels")
        return x.reshape(math.prod(x.shape[:-1]), self.channels)

    def _count(self, rows: np.ndarray, absmax: np.ndarray) -> None:
        pass

    def _clip(self) -> np.ndarray:
        return self.absmax.copy()

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"absmax": self.absmax}


@dataclass(eq=False)
class HistogramObserver(Absmax):
    """A clip chosen by a histogram of |x| over [0, 2^e), 2^e the power of two above the largest.

    counts: [channels or 1, BINS], zeros included; uint32 per channel (up to 2^32 rows), else int64.
    zeros: int64 [channels or 1].
    """

    choose: Clip = field(kw_only=True)
    counts: np.ndarray = field(init=False)
    zeros: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.counts = np.zeros((len(self.absmax), BINS), np.int64 if self.channels is None else np.uint32)
        self.zeros = np.zeros(len(self.absmax), np.int64)

    def _count(self, rows: np.ndarray, absmax: np.ndarray) -> None:
        self._widen(_exponents(absmax) - _exponents(self.absmax))
        scale = np.ldexp(np.float32(BINS), -_exponents(absmax))
        first = np.arange(len(absmax)) * BINS
        one = self.counts.dtype.type(1)  # np.add.at takes 9 ns a value, 176 where types differ
        for piece in _magnitudes(rows):
            self.zeros += len(piece) - np.count_nonzero(piece, axis=0)
            piece *= scale
            places = piece.astype(np.intp)
            places += first
            np.add.at(self.counts.reshape(-1), places.reshape(-1), one)

    def _widen(self, doublings: np.ndarray) -> None:
        """Double the channels' ranges so many times."""
        for times in np.unique(doublings[doublings > 0]):
            grown = doublings == times
            merged = min(BINS, 1 << min(int(times), 30))
            narrow = self.counts[grown]
            self.counts[grown] = 0
            self.counts[grown, : BINS // merged] = narrow.reshape(len(narrow), -1, merged).sum(axis=2)

    def _clip(self) -> np.ndarray:
        clips = np.zeros(len(self.absmax))
        width = np.ldexp(1.0, _exponents(self.absmax)) / BINS
        for start in range(0, len(clips), 128):
            part = slice(start, start + 128)
            counts = self.counts[part].astype(np.float64)
            counts[:, 0] -= self.zeros[part]
            clips[part] = self.choose(
                Histogram(counts, self.zeros[part].astype(float), self.absmax[part] / width[part])
            )
        return np.minimum(clips * width, self.absmax).astype(np.float32)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"absmax": self.absmax, "counts": self.counts, "zeros": self.zeros}


def observer(kind: str, codes: Codes = INT8, channels: int | None = None, *, percentile: float = 99.99) -> Observer:
    """An observer of one of KINDS, per tensor (channels=None) or per channel of the last axis.

    Raises OneVisionError for an unknown kind, codes without a sign, and a percentile outside of (0, 100].
    """
    if kind not in KINDS:
        raise OneVisionError(f"unknown observer {kind!r}: choose one of {', '.join(KINDS)}")
    if codes.name not in _CODES:
        raise OneVisionError(f"an observer cannot choose a clip for {codes.name}: choose one of {', '.join(_CODES)}")
    if not 0 < percentile <= 100:
        raise OneVisionError(f"the percentile {percentile} is not above 0 and at most 100")
    if kind == "absmax":
        return Absmax(kind, codes, channels, percentile)
    clips: dict[str, Clip] = {
        "percentile": partial(percentile_clip, percentile=percentile),
        "entropy": partial(entropy_clip, codes=codes),
        "mse": partial(mse_clip, codes=codes),
    }
    return HistogramObserver(kind, codes, channels, percentile, choose=clips[kind])


def restore(state: Mapping[str, np.ndarray]) -> Observer:
    """The observer whose `state()` this was, or the file that `np.savez` made of it.

    Raises OneVisionError where something of it is missing.
    """
    try:
        channels = int(state["channels"])
        codes = _CODES[str(state["codes"])]
        made = observer(
            str(state["kind"]), codes, None if channels < 0 else channels, percentile=float(state["percentile"])
        )
        assert isinstance(made, Absmax)
        made.rows = int(state["rows"])
        for name in made._arrays():
            setattr(made, name, state[name].copy())
    except KeyError as e:
        raise OneVisionError(f"the saved state of an observer is damaged: it has no {e}; collect again") from None
    return made


def _exponents(absmax: np.ndarray) -> np.ndarray:
    """Of the power of two above each value."""
    return np.where(absmax > 0, np.maximum(np.frexp(absmax)[1], _LOWEST), _LOWEST)


def _magnitudes(rows: np.ndarray) -> Iterator[np.ndarray]:
    """|x| of a few rows at a time, as new float32 arrays [rows, channels]."""
    height = max(1, _PIECE // max(rows.shape[1], 1))
    for start in range(0, len(rows), height):
        piece = rows[start : start + height].astype(np.float32)
        yield np.abs(piece, out=piece)
