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

from ..precision import FloatFormat
from ..precision.codes import Codes
from .layers import Op, Value


@dataclass(frozen=True, slots=True)
class WeightValues:
    """A quantised matrix in the graph: codes [in, out], its scale, the FP32 scale of FP8 scales if it has one."""

    codes: Value
    scale: Value
    block: int = 0
    tensor_scale: Value | None = None


@dataclass(frozen=True, slots=True)
class ActivationValues:
    """How an activation is quantised: one scale, and a zero point where the codes are asymmetric.

    TensorRT takes only a zero point of zero: leave it out for symmetric codes.
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
