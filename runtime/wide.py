"""NVFP4 weights for an engine without FP4: read from a bundle's data file, given as INT8 codes and plain scales.

A number of FP4 (E2M1) is a half of an integer up to 12, so INT8 codes of twice the value under half the scale are
the same numbers. Block scales are FP8 (E4M3) under one FP32 scale of the tensor.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..bundle import PackedWeight
from ..precision import FloatFormat

_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)
_FP4 = np.concatenate([_TWICE, -_TWICE])  # twice the value of each code


def _fp8_values() -> np.ndarray:
    """The value of every E4M3 code, float32 [256]."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values[codes & 127 == 127] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


_FP8 = _fp8_values()
# Both codes of every byte, the low half first.
_PAIRS = np.stack([_FP4[np.arange(256) & 15], _FP4[np.arange(256) >> 4]], axis=1).view(np.uint16).reshape(256)


def widened(data: Path, weight: PackedWeight, fmt: FloatFormat) -> dict[str, ort.OrtValue]:
    """Codes and scales of one matrix by parameter name: int8 [in, out], and `fmt` [in / block, out]."""
    rows, columns = weight.shape
    count = rows * columns
    packed = np.memmap(data, np.uint8, "r", weight.codes, (count + 1) // 2)
    codes = _PAIRS.take(packed).view(np.int8)[:count].reshape(rows, columns)
    stored = np.memmap(data, np.uint8, "r", weight.scales, (rows // weight.block, columns))
    scales = (_FP8.take(stored) * np.float32(weight.tensor_scale)).astype(fmt.numpy) / fmt.numpy.type(2)
    return {
        weight.name: ort.OrtValue.ortvalue_from_numpy(codes),
        f"{weight.name}_scale": ort.OrtValue.ortvalue_from_numpy(scales),
    }
