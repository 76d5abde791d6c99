"""GPTQ: the rounding error of each input row is spread over the rows still to come.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", with
scales fixed beforehand ("static groups") and rows in descending order of the Gram matrix' diagonal ("act-order").
Written as LDLQ, which Chee et al. 2023, "QuIP: 2-Bit Quantization of Large Language Models With Guarantees",
show to give the same codes without the inverse. With E = W - Q, rows in the order they are rounded,
and the damped Gram matrix H = U D U^T (U unit upper triangular, D diagonal):

    tr(E^T H E) = sum over k of D_k |E_k + sum over j < k of U_jk E_j|^2

so row k is rounded from W_k + sum over j < k of U_jk E_j, and what that rounding leaves is its term of the error.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import OneVisionError
from ..precision.codes import dequantize_linear, encode, floats, round_to_codes
from ..precision.formats import Format, Quantized, Scale, grid, quantize_with

_RETRIES = 4  # of a factorisation, each with ten times the damping
_SMALLEST = 2.0**-126  # mean of a diagonal; below it, float32 has fewer digits
_EXACT = 1024  # up to so many inputs, everything is computed in float64
_LEAF = 64  # columns LAPACK factors; from 128 on OpenBLAS starts threads for it, and waits for them
_ROWS = 128  # at most so many rounded between two products of matrices
_PRODUCT = 512  # rows of larger products
_COLUMNS = 2048  # worked on at a time, so that memory does not grow with the outputs


@dataclass(frozen=True, slots=True)
class Factor:
    """The Gram matrix of a Linear's inputs, damped and factored. Linears with the same input share it.

    order: [in], the inputs, those of least energy first. Rows are rounded from its end to its beginning,
      which makes U of the module's docstring the lower triangle of an ordinary Cholesky factor.
    lower: [in, in], unit lower triangular, float64 up to 1024 inputs, float32 above; None where no
      damping tried made the matrix positive definite, or all inputs are zero.
    pivots: [in] float64, D, in units of `unit`, the mean of the diagonal before damping.
    damping: what was added to the diagonal, in the same units.
    """

    order: np.ndarray
    lower: np.ndarray | None
    pivots: np.ndarray
    unit: float
    damping: float


def factor(gram: np.ndarray, damping: float = 0.01) -> Factor:
    """Factor a Gram matrix [in, in], the sum of x x^T over inputs x, in FP32 or float64.

    damping: added to the diagonal, in parts of its mean; ten times as much, up to four times, while the
    matrix is not positive definite. Beside `gram`, memory peaks at 1.3 matrices of its size in float32.
    Raises OneVisionError for NaN and infinity.
    """
    if not np.isfinite([gram.min(initial=0), gram.max(initial=0)]).all():
        raise OneVisionError("a Gram matrix holds NaN or infinity: the activations collected for it overflowed")
    diagonal = np.diagonal(gram).astype(np.float64)
    order, unit = np.argsort(diagonal, kind="stable"), float(diagonal.mean()) if diagonal.size else 0.0
    for _ in range(_RETRIES + 1 if unit > _SMALLEST else 0):
        lower = _ordered(gram, order, unit)
        lower[np.diag_indices_from(lower)] += damping
        if _cholesky(lower):
            roots = np.diagonal(lower).copy()
            lower /= roots
            return Factor(order, lower, np.square(roots.astype(np.float64)), unit, damping)
        damping = max(10 * damping, 1e-4)
    return Factor(order, None, np.ones(len(order)), unit, damping)


def gptq(weights: np.ndarray, factor: Factor, scale: Scale, format: Format, name: str = "weights") -> Quantized:
    """Codes of a matrix [in, out] (FP32, FP16 or BF16) under fixed scales, so that its products change least.

    The error of a product with the inputs that `factor` saw is E^T G E, for the Gram matrix G and the
    difference E of the weights and what the graph reads back. Each output whose error would not be less
    than that of plain rounding keeps plain rounding, and so do all where the Gram matrix has no factor.
    Beside arguments and result, memory peaks at 4 float32 arrays [in, 2048]. Raises OneVisionError as
    `quantize` does.
    """
    assert factor.order.shape == weights.shape[:1], f"{name}: a factor of {factor.order.size} inputs"
    result = quantize_with(weights, format, scale, name)
    if factor.lower is None:
        return result
    for start in range(0, weights.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        plain = Quantized(format, result.codes[:, columns], _of_columns(scale, format, columns))  # a view
        wide = floats(weights[:, columns])[factor.order].astype(factor.lower.dtype, copy=False)
        before = _output_errors(wide - floats(plain.dequantize())[factor.order], factor)
        slab = _Slab(wide, factor, plain.scale, format)
        slab.round(0, len(wide))
        after = _undamped(_squares(slab.targets, factor.pivots), slab.errors, factor)
        plain.codes[factor.order] = np.where(after < before, slab.codes, plain.codes[factor.order])
    return result


def _ordered(gram: np.ndarray, order: np.ndarray, unit: float) -> np.ndarray:
    """The matrix with its inputs in another order, in parts of `unit`."""
    result = np.empty(gram.shape, np.float64 if len(order) <= _EXACT else np.float32)
    for start in range(0, len(order), _PRODUCT):
        some = gram[order[start : start + _PRODUCT]].astype(result.dtype, copy=False)
        some /= unit
        np.take(some, order, axis=1, out=result[start : start + _PRODUCT], mode="clip")
    return result


def _cholesky(a: np.ndarray) -> bool:
    """Replace the first n columns of a lower triangle [m, n] by those of its Cholesky factor, by halves.

    Only its lower triangle is read; the upper becomes zero. False where it is not positive definite. In
    place: numpy.linalg.cholesky, at 9728 inputs, holds two more copies and takes three times as long.
    """
    n = a.shape[1]
    if n <= _LEAF:
        return _cholesky_leaf(a)
    half = n // 2
    if not _cholesky(a[:, :half]):
        return False
    a[:half, half:] = 0
    a[half:, half:] -= a[half:, :half] @ a[half:n, :half].T
    return _cholesky(a[half:, half:])


def _cholesky_leaf(a: np.ndarray) -> bool:
    n = a.shape[1]
    try:
        corner = np.linalg.cholesky(a[:n].astype(np.float64))
    except np.linalg.LinAlgError:
        return False
    a[:n] = corner
    a[n:] = a[n:].astype(np.float64) @ np.linalg.inv(corner).T
    return bool(np.isfinite(corner).all())


def _of_columns(scale: Scale, format: Format, columns: slice) -> Scale:
    return scale if format.pooled else Scale(scale.stored[..., columns], scale.fmt, scale.tensor)


def _output_errors(differences: np.ndarray, factor: Factor) -> np.ndarray:
    """The diagonal of E^T G E, float64 [out], of differences E [in, out] in the factor's order."""
    assert factor.lower is not None
    total = np.zeros(differences.shape[1])
    for start in range(0, len(differences), _PRODUCT):
        rows = slice(start, start + _PRODUCT)
        total += _squares(factor.lower[start:, rows].T @ differences[start:], factor.pivots[rows])
    return _undamped(total, differences, factor)


def _undamped(total: np.ndarray, differences: np.ndarray, factor: Factor) -> np.ndarray:
    """Errors [out] under the damped matrix, in its units, as errors under the matrix itself."""
    return factor.unit * (total - _squares(differences, np.full(len(differences), factor.damping)))


def _squares(values: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The weighted sum of squares of each column, in float64, piece by piece."""
    return np.einsum("i,io,io->o", factors, values, values, dtype=np.float64)


class _Slab:
    """Some columns of a matrix, rows in the factor's order, on the way from weights to codes."""

    def __init__(self, weights: np.ndarray, factor: Factor, scale: Scale, format: Format) -> None:
        """weights: [in, columns] in the dtype of the factor; overwritten."""
        assert factor.lower is not None
        self.lower, self.format, self.fmt = factor.lower, format, scale.fmt
        self.steps = grid(scale.value(), format)
        self.groups = factor.order // format.block if format.block else np.zeros_like(factor.order)
        self.codes = np.empty(weights.shape, format.codes.numpy)
        # Row by row, what the graph reads back is taken from both: errors are E, and what is left of the targets
        # is what rounding itself did, a row's term of the error.
        self.errors, self.targets = weights, weights.copy()

    def round(self, start: int, stop: int) -> None:
        """Round rows stop - 1 down to start, which know of the errors of all rows from `stop` on."""
        if stop - start <= _ROWS:
            self._round_each(slice(start, stop))
            return
        middle = (start + stop) // 2
        self.round(middle, stop)
        self.targets[start:middle] += self.lower[middle:stop, start:middle].T @ self.errors[middle:stop]
        self.round(start, middle)

    def _round_each(self, rows: slice) -> None:
        errors, targets, corner = self.errors[rows], self.targets[rows], self.lower[rows, rows].T.copy()
        steps = self.steps[self.groups[rows]]
        divisors = np.where(steps > 0, steps, np.float32(np.inf))
        quotients = np.empty(targets.shape, np.float32)
        number, spare = np.empty((2, targets.shape[1]), np.float32)
        for k in reversed(range(len(targets))):
            targets[k] += corner[k, k + 1 :] @ errors[k + 1 :]
            with np.errstate(over="ignore", under="ignore"):
                np.divide(targets[k].astype(np.float32), divisors[k], out=quotients[k])
            number[:] = quotients[k]
            round_to_codes(number, self.format.codes, spare)
            value = floats(dequantize_linear(number, steps[k], self.fmt))
            errors[k] -= value
            targets[k] -= value
        self.codes[rows] = encode(quotients, self.format.codes)
