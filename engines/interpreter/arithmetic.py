"""Numbers as TensorRT computes them: float16 and bfloat16 in float32, rounded once to the layer's type."""

import math
from functools import cache

import ml_dtypes
import numpy as np

from ...precision.codes import FP8, encode, floats

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)


def wide(x: np.ndarray) -> np.ndarray:
    """The values of any tensor as float32 (float32 itself is not copied)."""
    if x.dtype == np.float32:
        return x
    return floats(x) if x.dtype in FLOATS else x.astype(np.float32)


def rounded(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in a tensor's type: floats to nearest, ties to even, overflow to infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x).astype(dtype, copy=False)


def cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """CAST: floats to integers toward zero, anything but zero is true, floats to nearest."""
    if x.dtype in FLOATS and dtype in FLOATS:
        return rounded(wide(x), dtype)
    if dtype == FP8.numpy:
        return encode(wide(x).copy(), FP8)
    return rounded(x.astype(np.float32) if x.dtype == BFLOAT16 else x, dtype)


@cache
def _table(function: str, dtype: np.dtype) -> np.ndarray:
    """A function of every 16-bit float, in its type."""
    values = wide(np.arange(1 << 16, dtype=np.uint16).view(dtype))
    return rounded(_FUNCTIONS[function](values), dtype)


def apply(function: str, x: np.ndarray) -> np.ndarray:
    """ERF or one of the GELUs of a float tensor; exact to the rounding of its type."""
    if x.dtype in (np.dtype(np.float16), BFLOAT16):
        return _table(function, x.dtype).take(np.ascontiguousarray(x).view(np.uint16))
    return _FUNCTIONS[function](x).astype(np.float32)


def _erf(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.frompyfunc(math.erf, 1, 1)(x.astype(np.float64)), np.float64)


def _gelu_erf(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        wider = x.astype(np.float64)
        return np.where(np.isneginf(wider), np.nan, 0.5 * wider * (1 + _erf(wider / math.sqrt(2))))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        wider = x.astype(np.float64)
        return 0.5 * wider * (1 + np.tanh(math.sqrt(2 / math.pi) * (wider + 0.044715 * wider**3)))


_FUNCTIONS = {"ERF": _erf, "GELU_ERF": _gelu_erf, "GELU_TANH": _gelu_tanh}


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) of float32 values, without overflow."""
    half = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + half), half / (1 + half))


def softmax(x: np.ndarray, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    """Of float32 values. A row of -inf alone is NaN."""
    with np.errstate(invalid="ignore"):
        powers = np.exp(x - x.max(axis, keepdims=True, initial=-np.inf))
        return powers / powers.sum(axis, keepdims=True, dtype=np.float32)
