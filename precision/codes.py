"""The codes a quantised tensor is stored in, and the two ONNX operators that make and read them.

Everything here follows the ONNX specification of QuantizeLinear and DequantizeLinear (opset 24) to the
bit: division by the scale, rounding half to even, saturation, multiplication in float32.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ..errors import OneVisionError
from . import BF16, FloatFormat


@dataclass(frozen=True, slots=True)
class Codes:
    """A set of at most 256 numbers, stored in 4 or 8 bits.

    Integers when `mantissa` is None. Else floating point without infinities: `mantissa` bits after the
    leading one, `normal` the smallest number that has it.
    """

    name: str
    numpy: np.dtype
    onnx_type: int  # onnx.TensorProto.DataType
    bits: int
    lowest: float  # what anything below saturates to
    largest: float  # what anything above saturates to
    reach: tuple[float, float]  # what the extremes of a tensor are mapped to when nothing is clipped
    gap: float  # between the two largest numbers
    mantissa: int | None = None
    normal: float = 1.0

    @property
    def slack(self) -> float:
        """How far a scale may fall below what the extremes ask for, with no error above half a gap."""
        return 1 + self.gap / 2 / max(self.largest, -self.lowest)


# Either end of an INT4 block may set its scale, max(max / 7, -min / 8): no clipping and no code wasted. Normal
# weights in blocks of 32: 20.7 dB, against 20.3 with max|w| / 7 and 20.6 with max|w| / 8, which clips. For INT8
# that would gain 0.03 dB: its extremes go to +-127, and -128 is met only by what a clip or a search cuts off.
INT8 = Codes("int8", np.dtype(np.int8), 3, 8, -128, 127, (-127, 127), 1)
UINT8 = Codes("uint8", np.dtype(np.uint8), 2, 8, 0, 255, (0, 255), 1)
INT4 = Codes("int4", np.dtype(ml_dtypes.int4), 22, 4, -8, 7, (-8, 7), 1)
FP8 = Codes("fp8", np.dtype(ml_dtypes.float8_e4m3fn), 17, 8, -448, 448, (-448, 448), 32, 3, 2.0**-6)
FP4 = Codes("fp4", np.dtype(ml_dtypes.float4_e2m1fn), 23, 4, -6, 6, (-6, 6), 2, 1, 1.0)


def quantize_linear(x: np.ndarray, scale: np.ndarray, codes: Codes, zero_point: np.ndarray | int = 0) -> np.ndarray:
    """ONNX QuantizeLinear: saturate(round(x / scale) + zero_point) as an array of `codes.numpy`.

    scale (and zero_point) broadcast against x: expand per-axis and blocked scales first. The division
    rounds to the type of the two together (float16 for both in float16), as ONNX engines do it.
    Raises OneVisionError for NaN or infinity in x.
    """
    if not np.isfinite(x).all():
        raise OneVisionError("cannot quantise NaN or infinity")
    with np.errstate(over="ignore", under="ignore"):
        quotient = (x / scale).astype(np.float32)
    return encode(quotient, codes, zero_point)


def dequantize_linear(
    values: np.ndarray, scale: np.ndarray, fmt: FloatFormat, zero_point: np.ndarray | int = 0
) -> np.ndarray:
    """ONNX DequantizeLinear: (values - zero_point) * scale, multiplied in float32, rounded to `fmt` once.

    scale (and zero_point) broadcast against the values. Every product of a code and a float16 or
    bfloat16 scale is exact in float32, so this equals a multiplication in either type. BF16 comes as an
    array of ml_dtypes.bfloat16.
    """
    zero = np.asarray(zero_point).astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        return ((values.astype(np.float32) - zero) * scale.astype(np.float32)).astype(array_dtype(fmt))


def encode(quotient: np.ndarray, codes: Codes, zero_point: np.ndarray | int = 0) -> np.ndarray:
    """The codes nearest to float32 values, ties to even, saturating. Overwrites `quotient`."""
    if codes.mantissa is not None:
        return _encode_float(quotient, codes, codes.mantissa)
    np.rint(quotient, out=quotient)
    quotient += np.asarray(zero_point).astype(np.float32)
    np.clip(quotient, codes.lowest, codes.largest, out=quotient)
    if codes.bits == 4:
        return (quotient.astype(np.int8).view(np.uint8) & 0x0F).view(codes.numpy)
    return quotient.astype(codes.numpy)


def round_to_codes(x: np.ndarray, codes: Codes, spare: np.ndarray) -> None:
    """Replace float32 values by the numbers `codes` would store for them (signs of zero apart).

    spare: float32 array of the same shape, overwritten.
    """
    np.clip(x, codes.lowest, codes.largest, out=x)
    if codes.mantissa is None:
        np.rint(x, out=x)
        return
    # Adding 1.5 * 2^23 gaps leaves no bits below one gap: the processor's own rounding does the work.
    np.bitwise_and(x.view(np.uint32), np.uint32(0x7F800000), out=spare.view(np.uint32))
    np.maximum(spare, np.float32(codes.normal), out=spare)
    spare *= np.float32(1.5 * 2.0 ** (23 - codes.mantissa))
    x += spare
    x -= spare


def _encode_float(quotient: np.ndarray, codes: Codes, mantissa: int) -> np.ndarray:
    """Round, then read the code off the exponent and mantissa bits of what was rounded.

    With x + max(x, normal), numbers below the smallest normal one fall into an octave of their own, and
    all others move up by one: the top bits, less those of the smallest normal number, are the code.
    ml_dtypes' casts give the same codes at 6 to 8 ns a value; this takes 2.4.
    """
    signs = (quotient.view(np.uint32) >> np.uint32(32 - codes.bits)) & np.uint32(1 << (codes.bits - 1))
    octaves = np.empty_like(quotient)
    round_to_codes(quotient, codes, octaves)
    np.abs(quotient, out=quotient)
    np.maximum(quotient, np.float32(codes.normal), out=octaves)
    octaves += quotient
    result = octaves.view(np.uint32) >> np.uint32(23 - mantissa)
    result -= np.float32(codes.normal).view(np.uint32) >> np.uint32(23 - mantissa)
    result |= signs
    return result.astype(np.uint8).view(codes.numpy)


def pack(values: np.ndarray) -> np.ndarray:
    """The bytes of an array in an ONNX file, as uint8 [n]: 4-bit codes two to a byte, the first in the low half.

    An odd count leaves the last high half zero (ONNX IR specification, TensorProto.raw_data).
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype not in (INT4.numpy, FP4.numpy):
        return flat.view(np.uint8)
    nibbles = flat.view(np.uint8) & 0x0F
    packed = nibbles[0::2].copy()
    packed[: nibbles.size // 2] |= nibbles[1::2] << 4
    return packed


def unpack(data: np.ndarray, codes: Codes, shape: tuple[int, ...]) -> np.ndarray:
    """The array whose packed bytes are `data`."""
    if codes.bits == 8:
        return data.view(codes.numpy).reshape(shape)
    nibbles = np.stack([data & 0x0F, data >> 4], axis=1).reshape(-1)
    return nibbles[: int(np.prod(shape))].view(codes.numpy).reshape(shape)


def packed_nbytes(values: np.ndarray) -> int:
    """Bytes an array takes in an ONNX file."""
    return (values.size + 1) // 2 if values.dtype in (INT4.numpy, FP4.numpy) else values.nbytes


def array_dtype(fmt: FloatFormat) -> np.dtype:
    """The array type to compute with: ml_dtypes.bfloat16 for BF16, whose `numpy` is only its bits."""
    return np.dtype(ml_dtypes.bfloat16) if fmt is BF16 else fmt.numpy


def floats(values: np.ndarray) -> np.ndarray:
    """A float32 copy, in C order, of FP32, FP16 or BF16 values."""
    if values.dtype != ml_dtypes.bfloat16:
        return values.astype(np.float32, order="C")
    # By bits: numpy converts strided values of an added dtype one call at a time.
    wide = values.view(np.uint16).astype(np.uint32, order="C")
    wide <<= np.uint32(16)
    return wide.view(np.float32)
