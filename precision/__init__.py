"""The number formats a graph computes in."""

from dataclasses import dataclass

import numpy as np

from ..errors import OneVisionError


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A floating-point format as graphs, files and the host see it.

    `numpy` is the array dtype that holds it on the host. NumPy has no bfloat16, so BF16 is held as
    its bits in uint16: the host only ever copies such rows, it never computes with them.
    """

    name: str  # as the command line and the manifest spell it
    onnx: str  # as ONNX type names spell it
    numpy: np.dtype
    onnx_type: int  # onnx.TensorProto.DataType
    largest: float  # the largest finite value

    @property
    def itemsize(self) -> int:
        """Bytes per value."""
        return self.numpy.itemsize


FP32 = FloatFormat("fp32", "float32", np.dtype(np.float32), 1, 3.4028234663852886e38)
FP16 = FloatFormat("fp16", "float16", np.dtype(np.float16), 10, 65504.0)
BF16 = FloatFormat("bf16", "bfloat16", np.dtype(np.uint16), 16, 3.3895313892515355e38)

FLOAT_FORMATS = {f.name: f for f in (FP32, FP16, BF16)}


def float_format(name: str) -> FloatFormat:
    """The format called `name` (fp32, fp16 or bf16)."""
    try:
        return FLOAT_FORMATS[name]
    except KeyError:
        raise OneVisionError(f"unknown dtype {name!r}: choose one of {', '.join(FLOAT_FORMATS)}") from None


def from_float32(values: np.ndarray, fmt: FloatFormat) -> np.ndarray:
    """float32 values rounded to nearest even in a format, as the host holds it."""
    if fmt is not BF16:
        return values.astype(fmt.numpy, copy=False)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def float32(values: np.ndarray, fmt: FloatFormat) -> np.ndarray:
    """Values in a format, as the host holds it, in float32."""
    if fmt is not BF16:
        return values.astype(np.float32, copy=False)
    return (values.astype(np.uint32) << 16).view(np.float32)
