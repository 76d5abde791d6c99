"""The formats a Linear's weights are quantised to, and what a quantised matrix is.

A matrix is [in, out], as the graph stores it: one scale for all of it, one per output channel (column), or one
per block of input rows in each column. Sources: the ONNX specification of DequantizeLinear (granularity),
NVIDIA's TensorRT documentation, "Quantization Schemes" (INT8, INT4, FP8), and "Introducing NVFP4"
(blocks of 16, FP8 block scales, one FP32 scale of the tensor, max / (6 * 448)).
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from ..errors import OneVisionError
from . import FP32, FloatFormat
from .codes import FP4, FP8, INT4, INT8, Codes, array_dtype, dequantize_linear, encode, packed_nbytes
from .scales import ScaleType, absmax_steps, check_finite, search, tiles

# Scales tried, in parts of the one that clips nothing.
_SHRINK = np.linspace(1, 0.5, 21, dtype=np.float32)
# FP8 block scales lie 1/16 to 1/8 apart, so these reach every one from 10/16 to 24/16: the larger map the
# block's maximum to 4, where the gaps below are smaller ("Four Over Six", Cook et al. 2025).
_AROUND = np.array([16, 15, 14, 13, 12, 11, 10, 17, 18, 19, 20, 21, 22, 23, 24], np.float32) / np.float32(16)


@dataclass(frozen=True, slots=True)
class Format:
    """Codes, and how many of them share a scale."""

    name: str
    codes: Codes
    block: int = 0  # input rows that share a scale; 0: all of them
    pooled: bool = False  # one scale for the whole matrix
    two_level: bool = False  # scales stored in FP8, under one FP32 scale of the tensor
    ratios: tuple[float, ...] = tuple(map(float, _SHRINK))

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """The shape of the scale of a matrix [in, out]."""
        return () if self.pooled else (shape[0] // self.block, shape[1]) if self.block else (shape[1],)

    def nbytes(self, shape: tuple[int, int], fmt: FloatFormat) -> int:
        """Bytes of a matrix [in, out] and its scales, for a graph that computes in `fmt`."""
        codes, scales = (shape[0] * shape[1] * self.codes.bits + 7) // 8, math.prod(self.scale_shape(shape))
        return codes + (scales + FP32.itemsize if self.two_level else scales * fmt.itemsize)

    def rows(self, inputs: int, name: str = "weights") -> int:
        """Rows in a group of a matrix with `inputs` rows.

        Raises OneVisionError where blocks do not divide it. ONNX and ONNX Runtime would take a shorter
        last block; TensorRT's parser refuses it ("must divide into whole blocks").
        """
        if self.block and inputs % self.block:
            raise OneVisionError(
                f"{name} has {inputs} inputs, which blocks of {self.block} do not divide: "
                f"give it another block size, or a format without blocks"
            )
        return self.block or inputs


INT8_TENSOR = Format("int8-tensor", INT8, pooled=True)
INT8_CHANNEL = Format("int8-channel", INT8)
INT4_BLOCK32 = Format("int4-block32", INT4, block=32)
INT4_BLOCK128 = Format("int4-block128", INT4, block=128)
FP8_TENSOR = Format("fp8-tensor", FP8, pooled=True)
FP8_CHANNEL = Format("fp8-channel", FP8)
NVFP4 = Format("nvfp4", FP4, block=16, two_level=True, ratios=tuple(map(float, _AROUND)))
# What NVFP4 is to an engine without FP4: the same numbers as twice their value, under half the scale.
INT8_BLOCK16 = Format("int8-block16", INT8, block=16)

ALL = (INT8_TENSOR, INT8_CHANNEL, INT4_BLOCK32, INT4_BLOCK128, FP8_TENSOR, FP8_CHANNEL, NVFP4)
FORMATS = {f.name: f for f in (*ALL, INT8_BLOCK16)}


@dataclass(frozen=True, slots=True)
class Scale:
    """The scales of one matrix.

    stored: [], [out] or [in / block, out], in the graph's format `fmt` (FP8 in NVFP4).
    tensor: the FP32 scale of the scales, [], or None.
    """

    stored: np.ndarray
    fmt: FloatFormat
    tensor: np.ndarray | None = None

    def value(self) -> np.ndarray:
        """What the codes are multiplied by, in float32, in the shape of `stored`."""
        if self.tensor is None:
            return self.stored.astype(np.float32)
        return dequantize_linear(self.stored, self.tensor, self.fmt).astype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes in the data file."""
        return self.stored.nbytes + (self.tensor.nbytes if self.tensor is not None else 0)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised matrix: codes [in, out] and their scales. Symmetric: its zero point is zero."""

    format: Format
    codes: np.ndarray
    scale: Scale

    def dequantize(self) -> np.ndarray:
        """The matrix as the graph computes it, in the graph's format (ml_dtypes.bfloat16 for BF16)."""
        fmt = self.scale.fmt
        result = np.empty(self.codes.shape, array_dtype(fmt))
        block = self.format.rows(self.codes.shape[0])
        scale = grid(self.scale.value(), self.format)
        for tile in tiles(self.codes.shape, block):
            values = self.codes[tile.rows, tile.columns]
            grouped = values.reshape(-1, block, values.shape[1])
            result[tile.rows, tile.columns] = dequantize_linear(grouped, tile.of(scale)[:, None], fmt).reshape(
                values.shape
            )
        return result

    def columns(self, places: slice | np.ndarray) -> "Quantized":
        """Some of its columns."""
        stored = self.scale.stored if self.format.pooled else self.scale.stored[..., places]
        return Quantized(self.format, self.codes[:, places], replace(self.scale, stored=stored))

    @property
    def nbytes(self) -> int:
        """Bytes in the data file: codes as packed, and scales."""
        return packed_nbytes(self.codes) + self.scale.nbytes

    def in_int8(self) -> "Quantized":
        """NVFP4 as INT8 of twice each value, under half the scale: the same numbers, to the bit.

        (Where a block's scale is subnormal in FP16, below 2^-13, halving it may round.)
        """
        assert self.format is NVFP4
        doubled = (np.arange(256, dtype=np.uint8) & 0x0F).view(FP4.numpy).astype(np.float32) * 2
        codes = doubled.astype(np.int8).take(self.codes.view(np.uint8))
        half = (self.scale.value() / np.float32(2)).astype(array_dtype(self.scale.fmt))
        return Quantized(INT8_BLOCK16, codes, Scale(half, self.scale.fmt))


def quantize(
    weights: np.ndarray,
    format: Format,
    fmt: FloatFormat = FP32,
    *,
    search_scales: bool = False,
    importance: np.ndarray | None = None,
    clip: np.ndarray | float | None = None,
    name: str = "weights",
) -> Quantized:
    """A matrix [in, out] (FP32, FP16 or BF16) in `format`, for a graph that computes in `fmt`.

    See `choose_scale` for the options. Raises OneVisionError for NaN and infinity, for weights beyond
    `fmt`, and for blocks that do not divide `in`.
    """
    scale = choose_scale(weights, format, fmt, search_scales=search_scales, importance=importance, clip=clip, name=name)
    return quantize_with(weights, format, scale, name)


def choose_scale(
    weights: np.ndarray,
    format: Format,
    fmt: FloatFormat = FP32,
    *,
    search_scales: bool = False,
    importance: np.ndarray | None = None,
    clip: np.ndarray | float | None = None,
    name: str = "weights",
) -> Scale:
    """The scales of a matrix: the smallest that clip nothing, or those with the least squared error.

    INT8: max|w| / 127. INT4: max(max(w) / 7, max(-w) / 8), so that nothing is clipped and no code wasted.
    FP8: max|w| / 448. NVFP4: max|w| / 6 as FP8, under max|all w| / (6 * 448). A group of zeros has scale 1.
    search_scales: try smaller ones (NVFP4: also larger), keep the best of each group.
    importance: [in], how much an error in each input row counts in the search.
    clip: the largest magnitude to represent instead, in a shape that broadcasts to the scale's.
    """
    block = format.rows(weights.shape[0], name)
    steps = absmax_steps(weights, block, format.codes, format.pooled, fmt, name)
    kind = ScaleType(fmt, *_two_level(steps, format))
    if clip is not None:
        steps = np.minimum(steps, _clip_steps(clip, format, steps.shape, name))
    if search_scales:
        ratios = np.array(format.ratios, np.float32)
        stored = search(weights, block, format.codes, steps, kind, ratios, importance)
    else:
        stored = kind.store(steps, format.codes)
    tensor = None if kind.tensor is None else np.array(kind.tensor)
    return Scale(stored.reshape(format.scale_shape((weights.shape[0], weights.shape[1]))), fmt, tensor)


def quantize_with(weights: np.ndarray, format: Format, scale: Scale, name: str = "weights") -> Quantized:
    """A matrix [in, out] with scales already chosen: any rows of whole blocks, with their rows of scales.

    The quotient by the scale is rounded in float32, whatever the graph computes in. Raises OneVisionError
    as `quantize` does.
    """
    block = format.rows(weights.shape[0], name)
    values = grid(scale.value(), format)
    # A block scale that FP16 rounds to zero makes its block zero.
    divisors = np.where(values > 0, values, np.float32(np.inf))
    codes = np.empty(weights.shape, format.codes.numpy)
    for tile in tiles(weights.shape, block):
        tiled = tile.read(weights)
        check_finite(tiled.min(initial=0), tiled.max(initial=0), scale.fmt, name)
        with np.errstate(over="ignore", under="ignore"):
            tiled /= tile.of(divisors)[:, None]
        codes[tile.rows, tile.columns] = encode(tiled, format.codes).reshape(-1, tiled.shape[2])
    return Quantized(format, codes, scale)


def grid(scale: np.ndarray, format: Format) -> np.ndarray:
    """Scales of any granularity as [in / block, out], [1, out] or [1, 1]."""
    return scale if format.block else scale.reshape(1, -1)


def _two_level(steps: np.ndarray, format: Format) -> tuple[Codes | None, np.float32 | None]:
    """The type of the block scales and the scale of the scales: the largest step becomes 448."""
    if not format.two_level:
        return None, None
    largest = steps.max(initial=0)
    tensor = np.maximum(largest / np.float32(FP8.largest), np.float32(2.0**-126))
    return FP8, np.float32(tensor if largest > 0 else 1)


def _clip_steps(clip: np.ndarray | float, format: Format, shape: tuple[int, ...], name: str) -> np.ndarray:
    limits = np.asarray(clip, np.float32)
    if not (np.isfinite(limits).all() and (limits > 0).all()):
        raise OneVisionError(f"a clip of {name} is not positive and finite")
    return np.broadcast_to(limits / np.float32(format.codes.reach[1]), shape)
