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

from ..precision import FloatFormat

Value = ir.Value
Op = Any  # onnxscript's OpBuilder: its methods are the operators of the opset


class Weight(nn.Parameter):
    """A parameter read from the checkpoint.

    source_shape: the tensor's shape in the checkpoint. Its values are viewed as a matrix
    [source_shape[0], rest] and transposed when `transposed`, else taken in order.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: ir.DataType,
        source_shape: Sequence[int] = (),
        transposed: bool = False,
    ) -> None:
        super().__init__(shape, dtype)
        self.stored_shape = tuple(shape)
        self.source_shape = tuple(source_shape or shape)
        self.transposed = transposed

    @property
    def nbytes(self) -> int:
        """Bytes the parameter takes in the data file."""
        assert self.dtype is not None
        return math.prod(self.stored_shape) * int(self.dtype.itemsize)


def ir_dtype(fmt: FloatFormat) -> ir.DataType:
    """The graph's type for a float format."""
    return ir.DataType(fmt.onnx_type)


class Linear(nn.Module):
    """y = x W (+ b), W stored [in, out]."""

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
        self.weight = Weight([inputs, outputs], dtype, source_shape or [outputs, inputs], transposed=True)
        self.bias = Weight([outputs], dtype) if bias else None

    def forward(self, op: Op, x: Value) -> Value:
        y = op.MatMul(x, self.weight)
        return op.Add(y, self.bias) if self.bias is not None else y


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
