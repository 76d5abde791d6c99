"""Scales: from the extremes of a channel or a block, or by search for the least squared error.

A weight matrix is [in, out]. A group is what shares one scale: rows r*block .. (r+1)*block-1 of one column.
Steps and scales of all groups are arrays [in / block, out]. One float32 tile of about a quarter
megabyte is worked on at a time, so that memory stays small and the processor's cache holds it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import OneVisionError
from . import FP32, FloatFormat
from .codes import Codes, array_dtype, floats, round_to_codes

_TILE = 1 << 16  # values
_COLUMNS = 16  # at least so many columns a tile: whole cache lines of every row
_NORMAL = 2.0**-126  # below it, float32 has fewer digits, and processors may take it for zero
_GAIN = 1e-4  # a candidate must be better by this, or the float32 sums cannot tell them apart


@dataclass(frozen=True, slots=True)
class Tile:
    """Some groups of some columns."""

    groups: slice
    columns: slice
    block: int

    @property
    def rows(self) -> slice:
        """The rows of the matrix that the groups cover."""
        return slice(self.groups.start * self.block, self.groups.stop * self.block)

    def read(self, weights: np.ndarray) -> np.ndarray:
        """The values as float32 [groups, block, columns], a copy."""
        values = floats(weights[self.rows, self.columns])
        return values.reshape(-1, self.block, values.shape[1])

    def of(self, grid: np.ndarray) -> np.ndarray:
        """The part of an array [groups or 1, columns or 1] that belongs to the tile, as a view."""
        groups = self.groups if grid.shape[0] > 1 else slice(None)
        return grid[groups, self.columns if grid.shape[1] > 1 else slice(None)]


def tiles(shape: tuple[int, ...], block: int) -> Iterator[Tile]:
    """Tiles that cover a matrix [in, out] in whole groups of `block` rows."""
    groups, columns = shape[0] // block, shape[1]
    width = min(columns, max(_COLUMNS, _TILE // block))
    height = max(1, _TILE // (block * width))
    for g in range(0, groups, height):
        for c in range(0, columns, width):
            yield Tile(slice(g, min(g + height, groups)), slice(c, min(c + width, columns)), block)


@dataclass(frozen=True, slots=True)
class ScaleType:
    """How a scale is stored, and what it is worth where the graph multiplies with it.

    One level: stored in the graph's format `fmt`. Two levels (`tensor`): stored as `codes`, FP8 in
    NVFP4, worth stored * tensor rounded to `fmt`.
    """

    fmt: FloatFormat
    codes: Codes | None = None
    tensor: np.float32 | None = None

    @property
    def numpy(self) -> np.dtype:
        """The array type of what is stored."""
        return self.codes.numpy if self.codes is not None else array_dtype(self.fmt)

    def store(self, steps: np.ndarray, values: Codes) -> np.ndarray:
        """The scales nearest to float32 steps; a step of zero, where all is zero, becomes 1.

        Positive always: what would round to zero takes the smallest scale instead. One that fell so
        far below its step that the extremes would be clipped by more than half a gap takes the next.
        (With two levels in FP16 their product may still round further down, where it is below 2^-14.)
        """
        wanted = steps if self.tensor is None else np.minimum(steps / self.tensor, np.float32(448))
        smallest = max(float(_bits_to_scale(1, self.numpy)), _NORMAL)
        stored = np.maximum(wanted, np.float32(smallest)).astype(self.numpy)
        short = stored.astype(np.float32) * np.float32(values.slack) < wanted
        stored = _next(stored, short.astype(np.int8))
        stored = _next(stored, -self._overflows(stored, values).astype(np.int8))
        return np.where(steps > 0, stored, np.ones((), self.numpy))

    def value(self, stored: np.ndarray) -> np.ndarray:
        """What stored scales multiply codes by, in float32."""
        worth = stored.astype(np.float32)
        if self.tensor is None:
            return worth
        with np.errstate(under="ignore"):
            return (worth * self.tensor).astype(array_dtype(self.fmt)).astype(np.float32)

    def _overflows(self, stored: np.ndarray, values: Codes) -> np.ndarray:
        """Where the largest code, read back, would be infinite in the graph's format."""
        with np.errstate(over="ignore"):
            return ~np.isfinite((self.value(stored) * np.float32(values.reach[1])).astype(array_dtype(self.fmt)))


def _next(stored: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Positive floats moved by so many places of their type."""
    bits = np.ascontiguousarray(stored).view(f"u{stored.itemsize}")
    return (bits + steps.astype(bits.dtype)).view(stored.dtype)


def _bits_to_scale(bits: int, dtype: np.dtype) -> np.ndarray:
    return np.array(bits, f"u{dtype.itemsize}").view(dtype).astype(np.float32)


def absmax_steps(
    weights: np.ndarray, block: int, codes: Codes, pooled: bool, fmt: FloatFormat, name: str
) -> np.ndarray:
    """The smallest steps that clip nothing: float32 [in / block, out], or [1, 1] when `pooled`.

    Raises OneVisionError for NaN, infinity, and for weights beyond what the graph's format holds.
    """
    steps = np.empty((weights.shape[0] // block, weights.shape[1]), np.float32)
    for tile in tiles(weights.shape, block):
        values = tile.read(weights)
        low, high = values.min(axis=1, initial=0), values.max(axis=1, initial=0)
        check_finite(low, high, fmt, name)
        tile.of(steps)[...] = np.maximum(high / np.float32(codes.reach[1]), low / np.float32(codes.reach[0]))
    return steps.max(initial=0, keepdims=True) if pooled else steps


def check_finite(low: np.ndarray, high: np.ndarray, fmt: FloatFormat, name: str) -> None:
    """Raise OneVisionError unless all the extremes are numbers that `fmt` holds."""
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise OneVisionError(f"tensor {name} holds NaN or infinity: the checkpoint is damaged")
    largest = max(float(high.max(initial=0)), -float(low.min(initial=0)))
    if largest > fmt.largest:
        raise OneVisionError(f"tensor {name} reaches {largest:.4g}, beyond {fmt.name}'s {fmt.largest:.5g}")


def search(
    weights: np.ndarray,
    block: int,
    codes: Codes,
    steps: np.ndarray,
    kind: ScaleType,
    ratios: np.ndarray,
    importance: np.ndarray | None = None,
) -> np.ndarray:
    """The stored scales, of steps * ratios, with the least squared error in each group.

    steps: float32 [groups, out], or [1, 1] for one scale over everything. ratios: float32 [n], the first 1.
    importance: how much an error in each input row counts, [in] (mean squares of the activations); or how
    much errors in two rows of a block count together, [in / block, block, block] (their Gram matrices).
    """
    weight = None if importance is None else _root_importance(importance)
    if steps.size == 1:
        stored = kind.store(steps[None] * ratios[:, None, None], codes)
        parts = (_errors(tile, weights, codes, kind, stored, weight) for tile in tiles(weights.shape, block))
        return stored[_best(sum((e.sum(axis=(1, 2), dtype=np.float64) for e in parts), np.zeros(len(ratios))))]
    best = np.empty(steps.shape, kind.numpy)
    for tile in tiles(weights.shape, block):
        stored = kind.store(tile.of(steps)[None] * ratios[:, None, None], codes)
        choice = _best(_errors(tile, weights, codes, kind, stored, weight))
        tile.of(best)[...] = np.take_along_axis(stored, choice[None], axis=0)[0]
    return best


def _best(errors: np.ndarray) -> np.ndarray:
    """The first of the least errors [n, ...], or 0 unless it is clearly better than the first."""
    choice = errors.argmin(axis=0)
    return np.where(errors.min(axis=0) < errors[0] * (1 - _GAIN), choice, 0)


def _errors(
    tile: Tile, weights: np.ndarray, codes: Codes, kind: ScaleType, stored: np.ndarray, weight: np.ndarray | None
) -> np.ndarray:
    """Squared errors [candidates, groups, columns], in units of the first candidate.

    In those units nothing overflows, whatever the range of the weights.
    """
    scales = kind.value(stored)
    base = scales[0]
    units = tile.read(weights)
    units /= np.where(base > 0, base, np.float32(np.inf))[:, None]
    ratios = np.where(base > 0, scales / np.where(base > 0, base, 1), 1)
    deviations = _deviations(units, ratios, codes)
    errors = np.empty((len(ratios), units.shape[0], units.shape[2]), np.float32)
    if weight is not None and weight.ndim == 3:
        return _gram_errors(deviations, weight[tile.groups], errors.shape)
    for deviation, error in zip(deviations, errors, strict=True):
        if weight is not None:
            deviation *= weight[tile.rows].reshape(-1, tile.block, 1)
        np.einsum("gbc,gbc->gc", deviation, deviation, out=error)
    return errors


def _deviations(units: np.ndarray, ratios: np.ndarray, codes: Codes) -> Iterator[np.ndarray]:
    """What rounding to each candidate's codes changes, [groups, block, columns], in an array that is used again."""
    rounded, spare = np.empty_like(units), np.empty_like(units)
    for ratio in ratios:
        positive = np.where(ratio > 0, ratio, 1)[:, None]
        np.multiply(units, 1 / positive, out=rounded)
        round_to_codes(rounded, codes, spare)
        rounded *= positive
        rounded -= units
        yield rounded


def _gram_errors(deviations: Iterator[np.ndarray], roots: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """d^T G d of all deviations in one product of matrices: small ones keep a processor's threads waiting."""
    candidates, groups, columns = shape
    stacked = np.empty((groups, roots.shape[1], candidates, columns), np.float32)
    for i, deviation in enumerate(deviations):
        stacked[:, :, i] = deviation
    weighed = roots @ stacked.reshape(groups, roots.shape[1], -1)
    return np.einsum("gbn,gbn->gn", weighed, weighed).reshape(groups, candidates, columns).swapaxes(0, 1)


def _root_importance(importance: np.ndarray) -> np.ndarray:
    """Square roots of what is [in], and R with R^T R = G for every Gram matrix G of [groups, block, block]."""
    if importance.ndim == 3:
        return _roots(importance)
    largest = float(importance.max(initial=0))
    return np.sqrt(importance / largest if largest > 0 else np.ones_like(importance)).astype(np.float32)


def _roots(grams: np.ndarray) -> np.ndarray:
    """By eigenvalues: a Gram matrix of few samples has no Cholesky factor. Each in units of its own trace."""
    traces = np.trace(grams, axis1=1, axis2=2, dtype=np.float64)[:, None, None]
    values, vectors = np.linalg.eigh(grams / np.where(traces > 0, traces, 1))
    roots = np.sqrt(np.maximum(values, 0))[:, :, None] * vectors.transpose(0, 2, 1)
    return np.where(traces > 0, roots, np.eye(grams.shape[1])).astype(np.float32)


def symmetric(largest: float, codes: Codes, fmt: FloatFormat = FP32) -> np.ndarray:
    """The scale, a scalar, that spreads -largest .. largest over signed codes; 1 for zero.

    Raises OneVisionError unless `fmt` holds it.
    """
    if not 0 <= largest <= fmt.largest:
        raise OneVisionError(
            f"the largest magnitude {largest} is not a number from 0 to {fmt.name}'s {fmt.largest:.5g}"
        )
    return ScaleType(fmt).store(np.array([largest / codes.reach[1]], np.float32), codes).reshape(())


def asymmetric(low: float, high: float, fmt: FloatFormat = FP32) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point, both scalars, that spread low .. high over UINT8, with zero exact.

    Raises OneVisionError unless both are finite.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if not np.isfinite([low, high]).all():
        raise OneVisionError(f"the range {low} .. {high} is not finite")
    dtype = array_dtype(fmt)
    if high == low:
        return np.ones((), dtype), np.zeros((), np.uint8)
    smallest = max(float(_bits_to_scale(1, dtype)), _NORMAL)
    scale = np.array(max(high / 255 - low / 255, smallest)).astype(dtype)
    return scale, np.array(round(min(max(-low / float(scale), 0), 255)), np.uint8)
