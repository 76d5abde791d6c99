"""The layers both graphs are made of, as onnxscript modules: `forward(op, x)` appends nodes.

Parameters carry the checkpoint's names (their module path) and say how the stored tensor becomes the
graph's: a Linear's [out, in] is stored transposed, [in, out], which every engine multiplies as it is.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from ..precision import FP32, FloatFormat
from ..precision.codes import FP8, INT8
from ..precision.formats import FORMATS, Format
from ..precision.plan import FLOAT, Plan, Precision
from .patterns import ActivationValues, Op, Value, WeightValues, dequantize_weight, quantize_dequantize


class Weight(nn.Parameter):
    """A parameter read from the checkpoint, or made by calibration.

    source_shape: the tensor's shape in the checkpoint. Its values are viewed as a matrix
    [source_shape[0], rest] and transposed when `transposed`, else taken in order. computed: the values are not
    the checkpoint's own: codes, which have a source, and scales, which have none.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: ir.DataType,
        source_shape: Sequence[int] | None = None,
        transposed: bool = False,
        computed: bool = False,
    ) -> None:
        super().__init__(shape, dtype)
        self.stored_shape = tuple(shape)
        self.source_shape = None if computed and not source_shape else tuple(source_shape or shape)
        self.transposed, self.computed = transposed, computed

    @property
    def nbytes(self) -> int:
        """Bytes the parameter takes in the data file."""
        assert self.dtype is not None
        return (math.prod(self.stored_shape) * self.dtype.bitwidth + 7) // 8


def ir_dtype(fmt: FloatFormat) -> ir.DataType:
    """The graph's type for a float format."""
    return ir.DataType(fmt.onnx_type)


class Feed:
    """What one or several Linears read: a value that has one scale for all that want it in the same codes."""

    def __init__(self) -> None:
        self.scales: dict[str, Weight] = {}  # by the name of the codes; the first Linear that asked holds it
        self.rounded: dict[str, Value] = {}


class Linear(nn.Module):
    """y = x W (+ b), W stored [in, out], in the precision that `quantize` sets."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        fmt: FloatFormat,
        bias: bool = False,
        source_shape: Sequence[int] = (),
    ) -> None:
        super().__init__()
        dtype = ir_dtype(fmt)
        self.inputs, self.outputs, self.fmt = inputs, outputs, fmt
        self.weight = Weight([inputs, outputs], dtype, source_shape or [outputs, inputs], transposed=True)
        self.bias = Weight([outputs], dtype) if bias else None
        self.precision, self.feed = FLOAT, Feed()
        self.weight_scale: Weight | None = None
        self.weight_scale_2: Weight | None = None  # of the scales themselves, in NVFP4
        self.input_scale: Weight | None = None

    def quantize(self, precision: Precision) -> None:
        """Store the weights in a precision's codes and round the input to its activation's, where it has them."""
        self.precision = precision
        if precision.format is not None:
            self._store_codes(FORMATS[precision.format])
        if precision.activation is not None and precision.activation not in self.feed.scales:
            self.input_scale = Weight([], ir_dtype(self.fmt), computed=True)
            self.feed.scales[precision.activation] = self.input_scale

    def _store_codes(self, form: Format) -> None:
        shape = (self.inputs, self.outputs)
        scale_type = ir.DataType.FLOAT8E4M3FN if form.two_level else ir_dtype(self.fmt)
        self.weight = Weight(shape, ir.DataType(form.codes.onnx_type), self.weight.source_shape, True, computed=True)
        self.weight_scale = Weight(form.scale_shape(shape), scale_type, computed=True)
        if form.two_level:
            self.weight_scale_2 = Weight([], ir_dtype(FP32), computed=True)

    def forward(self, op: Op, x: Value) -> Value:
        y = op.MatMul(self.rounded(op, x), self.matrix(op))
        return op.Add(y, self.bias) if self.bias is not None else y

    def rounded(self, op: Op, x: Value) -> Value:
        """The input as its codes hold it.

        FP8 codes of a value are made once, by the first Linear that reads it. Each Linear makes its own INT8 ones,
        with a zero point of its own: on x86, ONNX Runtime multiplies in integers only where one product reads the
        codes (eight layers of 1,024 on 2 cores: 424 ms for 256 tokens instead of 1,676, 23 for one instead of 375).
        A TensorRT engine is the same size either way.
        """
        codes = self.precision.activation
        if codes is None:
            return x
        scale = self.feed.scales[codes]
        if codes == INT8.name:
            zero = op.initializer(ir.tensor(np.zeros((), np.int8)), name="input_zero_point")
            return quantize_dequantize(op, x, ActivationValues(INT8, scale, zero))
        if codes not in self.feed.rounded:
            self.feed.rounded[codes] = quantize_dequantize(op, x, ActivationValues(FP8, scale))
        return self.feed.rounded[codes]

    def matrix(self, op: Op) -> Value:
        """The weights in the graph's float."""
        if self.weight_scale is None:
            return self.weight
        values = WeightValues(self.weight, self.weight_scale, self.precision.block, self.weight_scale_2)
        return dequantize_weight(op, values, self.fmt)


ACTIVATION_CODES = {codes.name: codes for codes in (INT8, FP8)}


def share_feed(*linears: Linear) -> None:
    """Tell Linears that read the same value, in this order, that they do."""
    for linear in linears:
        linear.feed = linears[0].feed


def named_linears(root: nn.Module) -> dict[str, Linear]:
    """Every Linear under `root`, by its path in the checkpoint."""
    return {path: module for path, module in root.named_modules(root.name or "") if isinstance(module, Linear)}


def apply_plan(root: nn.Module, graph: str, plan: Plan) -> None:
    """Give every Linear under `root` the precision that the plan has for it."""
    for path, linear in named_linears(root).items():
        linear.quantize(plan.precision(graph, path, linear.inputs))


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, statistics in float32."""

    def __init__(self, width: int, eps: float, fmt: FloatFormat) -> None:
        super().__init__()
        self.weight = Weight([width], ir_dtype(fmt))
        self.bias = Weight([width], ir_dtype(fmt))
        self.eps = eps

    def forward(self, op: Op, x: Value) -> Value:
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self.eps, stash_type=1)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, statistics in float32."""

    def __init__(self, width: int, eps: float, fmt: FloatFormat) -> None:
        super().__init__()
        self.weight = Weight([width], ir_dtype(fmt))
        self.eps = eps

    def forward(self, op: Op, x: Value) -> Value:
        return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.eps, stash_type=1)


def rotate(op: Op, x: Value, cos: Value, sin: Value, fmt: FloatFormat) -> Value:
    """Rotary embedding of heads x [batch, heads, tokens, head_dim], half-split form, in float32.

    cos, sin: float32 [batch, tokens, head_dim / 2].
    """
    rotated = op.RotaryEmbedding(from_format(op, x, fmt), cos, sin)
    return to_format(op, rotated, fmt)


def to_format(op: Op, x: Value, fmt: FloatFormat) -> Value:
    """A float32 value in the graph's format."""
    return x if fmt.name == "fp32" else op.Cast(x, to=fmt.onnx_type)


def from_format(op: Op, x: Value, fmt: FloatFormat) -> Value:
    """A value of the graph's format in float32."""
    return x if fmt.name == "fp32" else op.Cast(x, to=int(ir.DataType.FLOAT))


def split_heads(op: Op, x: Value, heads: int, head_dim: int) -> Value:
    """[batch, tokens, heads * head_dim] -> [batch, tokens, heads, head_dim]."""
    return op.Reshape(x, [0, 0, heads, head_dim])


def heads_first(op: Op, x: Value) -> Value:
    """[batch, tokens, heads, head_dim] -> [batch, heads, tokens, head_dim]."""
    return op.Transpose(x, perm=[0, 2, 1, 3])


def merge_heads(op: Op, x: Value, width: int) -> Value:
    """[batch, heads, tokens, head_dim] -> [batch, tokens, width]."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, width])


def rotary_angles(op: Op, positions: Value, theta: float, width: int) -> Value:
    """positions * theta^(-2k / width) for k in [0, width / 2), in float32.

    positions: int64 [a, b] -> float32 [a, b, width / 2].
    """
    frequencies = (1.0 / theta ** (np.arange(0, width, 2) / width)).astype(np.float32)
    constant = op.initializer(ir.tensor(frequencies.reshape(1, 1, -1)), name="inverse_frequencies")
    return op.Mul(op.Unsqueeze(op.Cast(positions, to=int(ir.DataType.FLOAT)), [2]), constant)


def gelu(op: Op, x: Value, kind: str) -> Value:
    """The activation that `kind` names in a config: gelu (exact), gelu_pytorch_tanh, quick_gelu."""
    if kind == "quick_gelu":
        return op.Mul(x, op.Sigmoid(op.Mul(x, 1.702)))
    return op.Gelu(x, approximate="tanh" if kind == "gelu_pytorch_tanh" else "none")


def attention(op: Op, q: Value, k: Value, v: Value, mask: Value | None, fmt: FloatFormat) -> Value:
    """Scaled dot-product attention of q [batch, heads, s, d] over k, v [batch, kv_heads, t, d].

    mask: bool [batch, 1, s, t], true where s sees t; None for full attention. Query heads
    j*g .. j*g+g-1 share key head j. Returns [batch, heads, s, d].
    """
    head_dim = _dims(q)[-1]
    if fmt.name != "fp32":
        return op.Attention(q, k, v, mask, scale=1.0 / math.sqrt(head_dim))
    return _attention_products(op, q, k, v, mask, head_dim)


def _attention_products(op: Op, q: Value, k: Value, v: Value, mask: Value | None, head_dim: int) -> Value:
    """The same in plain products: TensorRT has no fused float32 kernel and refuses the operator there."""
    batch, heads, tokens, _ = _dims(q)
    kv_heads = _dims(k)[1]
    groups = heads // kv_heads
    q = op.Reshape(op.Mul(q, 1.0 / math.sqrt(head_dim)), [0, kv_heads, groups, -1, head_dim])
    q.shape = ir.Shape([batch, kv_heads, groups, tokens, head_dim])
    scores = op.MatMul(q, op.Transpose(op.Unsqueeze(k, [2]), perm=[0, 1, 2, 4, 3]))
    if mask is not None:
        scores = op.Where(op.Unsqueeze(mask, [2]), scores, float(np.finfo(np.float32).min))
    y = op.MatMul(op.Softmax(scores, axis=-1), op.Unsqueeze(v, [2]))
    y = op.Reshape(y, [0, heads, -1, head_dim])
    y.shape = ir.Shape([batch, heads, tokens, head_dim])
    return y


def _dims(value: Value) -> list[Any]:
    """A value's dimensions: sizes, and symbols for free ones."""
    assert value.shape is not None
    return list(value.shape)
