"""The standard ONNX nodes (opset 24) of a quantised product, in the forms that TensorRT fuses.

What each precision becomes, x [..., in] and weights [in, out]:

    INT8, FP8       x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear (axis 1) <- codes, scale
    INT8 weights    x -> MatMul <- DequantizeLinear (axis 1) <- codes, scale
    INT4            x -> MatMul <- DequantizeLinear (axis 0, block_size) <- codes, scale
    NVFP4           x -> MatMul <- DequantizeLinear (axis 0, block_size) <- codes,
                                   DequantizeLinear <- FP8 scales, FP32 scale

Scales are of the type the graph computes in: with FP32 scales in an FP16 graph ONNX Runtime fuses INT4 and INT8
weights into a node of mixed types that it then refuses, and TensorRT-RTX does not build INT4. Only the
tensor scale of NVFP4 is FP32 always, since FP16 has too few digits there (0.1 / 2688 is subnormal).
"""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ..precision import FloatFormat
from ..precision.codes import Codes

Value = ir.Value
Op = Any  # onnxscript's OpBuilder: its methods are the operators of the opset


@dataclass(frozen=True, slots=True)
class WeightValues:
    """A quantised matrix in the graph: codes [in, out], its scale, the FP32 scale of FP8 scales if it has one."""

    codes: Value
    scale: Value
    block: int = 0
    tensor_scale: Value | None = None


@dataclass(frozen=True, slots=True)
class ActivationValues:
    """How an activation is quantised: one scale, and a zero point.

    TensorRT takes only a zero point of zero. INT8 codes want that one written out: without, ONNX Runtime leaves
    the product in floating point (a 2,560 x 9,728 one of 256 rows takes 100 ms instead of 16, of one row 37
    instead of 0.3).
    """

    codes: Codes
    scale: Value
    zero_point: Value | None = None


def matmul(
    op: Op, x: Value, weight: WeightValues, fmt: FloatFormat, activation: ActivationValues | None = None
) -> Value:
    """x [..., in] times the matrix: [..., out], computed in `fmt`."""
    if activation is not None:
        x = quantize_dequantize(op, x, activation)
    return op.MatMul(x, dequantize_weight(op, weight, fmt))


def dequantize_weight(op: Op, weight: WeightValues, fmt: FloatFormat) -> Value:
    """The matrix [in, out] in `fmt`."""
    scale = weight.scale
    if weight.tensor_scale is not None:
        scale = op.DequantizeLinear(scale, weight.tensor_scale, output_dtype=fmt.onnx_type)
    if weight.block:
        return op.DequantizeLinear(weight.codes, scale, axis=0, block_size=weight.block)
    return op.DequantizeLinear(weight.codes, scale, axis=1)


def quantize_dequantize(op: Op, x: Value, activation: ActivationValues) -> Value:
    """x rounded to what its codes can hold."""
    scale, zero_point = activation.scale, activation.zero_point
    if zero_point is None:
        codes = op.QuantizeLinear(x, scale, output_dtype=activation.codes.onnx_type)
        return op.DequantizeLinear(codes, scale)
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)
