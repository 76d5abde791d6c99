"""What is kept of the activations at one tap: sums per channel, a bounded sample of rows, and a Gram matrix if asked.

Nothing else of them stays. Which rows are sampled is drawn before the first is seen, from the number there will be,
so that a collection that was interrupted and goes on keeps the same.
"""

from dataclasses import dataclass, field

import numpy as np

from ..errors import OneVisionError

_ROWS = 1024  # of a value that are gathered for one product: 90 at a time cost twice as much memory traffic as work
_SLAB = 1024  # rows of a Gram matrix worked on at a time


@dataclass
class Statistics:
    """Of a value [rows, channels] that comes in pieces. total: how many rows there will be."""

    channels: int
    total: int
    samples: int
    seed: int
    with_gram: bool = False
    rows: int = 0
    absmax: np.ndarray = field(init=False)  # float32 [channels]
    magnitude: np.ndarray = field(init=False)  # sums of |x|, float64 [channels]
    square: np.ndarray = field(init=False)  # sums of x^2, float64 [channels]
    sample: np.ndarray = field(init=False)  # float32 [min(samples, total), channels]
    gram: np.ndarray | None = None  # sums of x x^T, float32 [channels, channels]

    def __post_init__(self) -> None:
        self.absmax = np.zeros(self.channels, np.float32)
        self.magnitude, self.square = np.zeros(self.channels), np.zeros(self.channels)
        count = min(self.samples, self.total)
        chosen = np.random.default_rng(self.seed).choice(self.total, count, replace=False)
        self._places = np.sort(chosen)
        self.sample = np.zeros((count, self.channels), np.float32)
        if self.with_gram:
            self.gram = np.zeros((self.channels, self.channels), np.float32)
            self._gathered = np.empty((min(_ROWS, self.total), self.channels), np.float32)

    def update(self, x: np.ndarray, where: str = "") -> None:
        """Take the next rows, float32 [..., channels]. Raises OneVisionError for NaN and infinity."""
        rows = x.reshape(-1, self.channels)
        magnitudes = np.abs(rows)
        absmax = magnitudes.max(axis=0, initial=0)
        if not np.isfinite(absmax).all():
            raise OneVisionError(
                f"the input of {where} reaches NaN or infinity in full precision: the checkpoint is damaged, or a row "
                "of the calibration data is"
            )
        np.maximum(self.absmax, absmax, out=self.absmax)
        self.magnitude += magnitudes.sum(axis=0, dtype=np.float64)
        self.square += np.einsum("rc,rc->c", rows, rows, dtype=np.float64)
        if self.gram is not None:
            self._gather(rows)
        start, stop = np.searchsorted(self._places, (self.rows, self.rows + len(rows)))
        self.sample[start:stop] = rows[self._places[start:stop] - self.rows]
        self.rows += len(rows)

    def _gather(self, rows: np.ndarray) -> None:
        """Add rows to the Gram matrix, in pieces that fill the buffer; the last when all there will be are here."""
        done, held = 0, self.rows % _ROWS
        while done < len(rows):
            count = min(len(rows) - done, len(self._gathered) - held)
            self._gathered[held : held + count] = rows[done : done + count]
            done, held = done + count, held + count
            if held == len(self._gathered) or self.rows + done == self.total:
                self._add_products(self._gathered[:held])
                held = 0

    def _add_products(self, rows: np.ndarray) -> None:
        assert self.gram is not None
        for start in range(0, self.channels, _SLAB):
            stop = start + _SLAB
            self.gram[start:stop, :stop] += rows[:, start:stop].T @ rows[:, :stop]
            self.gram[:start, start:stop] = self.gram[start:stop, :start].T

    def mean_square(self) -> np.ndarray:
        """Mean of x^2, float32 [channels]: how much an error in each input row of the weights counts."""
        return (self.square / max(self.rows, 1)).astype(np.float32)

    def mean_magnitude(self) -> np.ndarray:
        """Mean of |x|, float32 [channels]."""
        return (self.magnitude / max(self.rows, 1)).astype(np.float32)
