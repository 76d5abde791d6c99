"""What each layer type computes: KERNELS[type](layer, inputs) is its output, in the type that TensorRT gives it."""

from collections.abc import Callable

import numpy as np

from ...precision.codes import FP4, FP8, INT4, INT8, Codes, encode
from . import attention, movement
from .arithmetic import FLOATS, apply, cast, rounded, sigmoid, softmax, wide
from .movement import Given, present
from .network import Layer

Kernel = Callable[[Layer, Given], np.ndarray]


def _dtype(layer: Layer) -> np.dtype:
    return layer.outputs[0].dtype


def _alike(layer: Layer, *arrays: np.ndarray) -> None:
    """Refuse operands of different types: a strongly typed network converts nothing on its own."""
    if len({array.dtype for array in arrays}) > 1:
        raise layer.error(f"its inputs are {' and '.join(str(array.dtype) for array in arrays)}")


def constant(layer: Layer, inputs: Given) -> np.ndarray:
    """CONSTANT."""
    assert layer.constant is not None
    return layer.constant.array()


def cast_(layer: Layer, inputs: Given) -> np.ndarray:
    """CAST to the output's type."""
    return cast(present(layer, inputs, 0), _dtype(layer))


def identity(layer: Layer, inputs: Given) -> np.ndarray:
    """IDENTITY, and ATTENTION_OUTPUT, whose value its ATTENTION_INPUT made."""
    return present(layer, inputs, 0)


def matrix_multiply(layer: Layer, inputs: Given) -> np.ndarray:
    """MATRIX_MULTIPLY: products summed in float32, rounded once."""
    a, b = present(layer, inputs, 0), present(layer, inputs, 1)
    _alike(layer, a, b)
    first, second = (oriented(layer, x, op) for x, op in ((a, "op0"), (b, "op1")))
    try:
        product = np.matmul(first, second)
    except ValueError:
        raise layer.error(f"a matrix product of shapes {a.shape} and {b.shape}") from None
    vectors = [layer.attributes[op] == "VECTOR" for op in ("op0", "op1")]
    axes = tuple(axis for axis, vector in zip((-2, -1), vectors, strict=True) if vector)
    return rounded(product.squeeze(axes) if axes else product, _dtype(layer))


def oriented(layer: Layer, x: np.ndarray, op: str) -> np.ndarray:
    """An operand in float32 as a stack of matrices; a vector is a row on the left, a column on the right."""
    kind = layer.attributes[op]
    if kind == "VECTOR":
        return np.expand_dims(wide(x), -2 if op == "op0" else -1)
    return wide(x).swapaxes(-1, -2) if kind == "TRANSPOSE" else wide(x)


def _truncated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Division; of integers toward zero."""
    if a.dtype.kind != "i":
        return a / b
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "SUM": np.add,
    "PROD": np.multiply,
    "SUB": np.subtract,
    "DIV": _truncated,
    "FLOOR_DIV": np.floor_divide,
    "MAX": np.maximum,
    "MIN": np.minimum,
    "POW": np.power,
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
    "EQUAL": np.equal,
    "LESS": np.less,
    "GREATER": np.greater,
}


def elementwise(layer: Layer, inputs: Given) -> np.ndarray:
    """ELEMENTWISE of two tensors of one type and rank; dimensions of 1 are repeated."""
    a, b = present(layer, inputs, 0), present(layer, inputs, 1)
    _alike(layer, a, b)
    if a.ndim != b.ndim or any(m != n and 1 not in (m, n) for m, n in zip(a.shape, b.shape, strict=True)):
        raise layer.error(f"shapes {a.shape} and {b.shape} do not fit")
    if a.dtype in FLOATS:
        a, b = wide(a), wide(b)
    op = layer.attributes["op"]
    if op in ("DIV", "FLOOR_DIV") and b.dtype.kind == "i" and not b.all():
        raise layer.error("an integer is divided by zero")
    with np.errstate(all="ignore"):
        return rounded(_chosen(layer, _BINARY)(a, b), _dtype(layer))


def _chosen(layer: Layer, table: dict) -> Callable:
    op = layer.attributes["op"]
    if op not in table:
        raise layer.error(f"operation {op}, which the interpreter does not know")
    return table[op]


_UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ABS": np.abs,
    "NEG": np.negative,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "ROUND": np.rint,
    "SIGN": np.sign,
    "EXP": np.exp,
    "LOG": np.log,
    "SQRT": np.sqrt,
    "RECIP": lambda x: 1 / x,
    "SIN": np.sin,
    "COS": np.cos,
    "TAN": np.tan,
    "NOT": np.logical_not,
    "ISNAN": np.isnan,
    "ISINF": np.isinf,
}


def unary(layer: Layer, inputs: Given) -> np.ndarray:
    """UNARY, in float32 for floats."""
    x = present(layer, inputs, 0)
    if layer.attributes["op"] == "ERF":
        return apply("ERF", x)
    with np.errstate(all="ignore"):
        return rounded(_chosen(layer, _UNARY)(wide(x) if x.dtype in FLOATS else x), _dtype(layer))


def activation(layer: Layer, inputs: Given) -> np.ndarray:
    """ACTIVATION, in float32, GELU in float64."""
    x, op = present(layer, inputs, 0), layer.attributes["op"]
    alpha, beta = np.float32(layer.attributes["alpha"]), np.float32(layer.attributes["beta"])
    if op.startswith("GELU"):
        return apply(op, x)
    functions = {
        "RELU": lambda x: np.maximum(x, np.float32(0)),
        "SIGMOID": sigmoid,
        "TANH": np.tanh,
        "CLIP": lambda x: np.clip(x, alpha, beta),
        "LEAKY_RELU": lambda x: np.where(x >= 0, x, alpha * x),
    }
    with np.errstate(over="ignore", under="ignore"):
        return rounded(_chosen(layer, functions)(wide(x)), _dtype(layer))


_REDUCTIONS = {"SUM": np.sum, "AVG": np.mean, "MAX": np.max, "MIN": np.min, "PROD": np.prod}


def reduce(layer: Layer, inputs: Given) -> np.ndarray:
    """REDUCE over axes; floats in float32."""
    x = present(layer, inputs, 0)
    values = wide(x) if x.dtype in FLOATS else x
    result = _chosen(layer, _REDUCTIONS)(values, axis=layer.attributes["axes"], keepdims=layer.attributes["keep_dims"])
    return rounded(np.asarray(result), _dtype(layer))


def softmax_(layer: Layer, inputs: Given) -> np.ndarray:
    """SOFTMAX, in float32."""
    return rounded(softmax(wide(present(layer, inputs, 0)), layer.attributes["axes"]), _dtype(layer))


def normalization(layer: Layer, inputs: Given) -> np.ndarray:
    """NORMALIZATION: (x - mean) / sqrt(variance + epsilon) * scale + bias in float32, rounded once."""
    x, scale, bias = (present(layer, inputs, i) for i in range(3))
    _alike(layer, x, scale, bias)
    axes, values = layer.attributes["axes"], wide(x)
    centred = values - values.mean(axes, keepdims=True, dtype=np.float32)
    variance = np.square(centred).mean(axes, keepdims=True, dtype=np.float32)
    normal = centred / np.sqrt(variance + np.float32(layer.attributes["epsilon"]))
    return rounded(normal * wide(scale) + wide(bias), _dtype(layer))


def select(layer: Layer, inputs: Given) -> np.ndarray:
    """SELECT: input 1 where input 0 is true, else input 2."""
    condition, yes, no = (present(layer, inputs, i) for i in range(3))
    _alike(layer, yes, no)
    return np.where(condition, yes, no)


CODES = {codes.numpy: codes for codes in (INT8, INT4, FP8, FP4)}


def quantize(layer: Layer, inputs: Given) -> np.ndarray:
    """QUANTIZE: x / scale in float32, to the nearest code, ties to even, saturating."""
    x = present(layer, inputs, 0)
    scale = _spread_scale(layer, inputs, x)
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        quotient = wide(x) / scale
    if np.isnan(quotient).any():
        raise layer.error("NaN has no code")
    return encode(quotient, _codes(layer, _dtype(layer)))


def dequantize(layer: Layer, inputs: Given) -> np.ndarray:
    """DEQUANTIZE: code * scale in float32, rounded once."""
    codes = present(layer, inputs, 0)
    _codes(layer, codes.dtype)
    with np.errstate(over="ignore", under="ignore"):
        return rounded(codes.astype(np.float32) * _spread_scale(layer, inputs, codes), _dtype(layer))


def _codes(layer: Layer, dtype: np.dtype) -> Codes:
    if dtype not in CODES:
        raise layer.error(f"codes of type {dtype}, which the interpreter does not know")
    return CODES[dtype]


def _spread_scale(layer: Layer, inputs: Given, x: np.ndarray) -> np.ndarray:
    """The scale, in float32, in a shape that broadcasts to x: one, one per place of an axis, or one per block."""
    scale = wide(present(layer, inputs, 1))
    zero = inputs[2] if len(inputs) > 2 else None
    if zero is not None and np.any(wide(zero)):
        raise layer.error("a zero point that is not zero")
    if scale.size == 1:
        return scale.reshape([1] * x.ndim)
    axis = layer.attributes["axis"]
    if scale.ndim == 1:
        if scale.shape[0] != x.shape[axis]:
            raise layer.error(f"{scale.shape[0]} scales for axis {axis} of shape {x.shape}")
        return scale.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    if scale.ndim != x.ndim or any(m % n for m, n in zip(x.shape, scale.shape, strict=True)):
        raise layer.error(f"scales of shape {scale.shape} do not divide {x.shape} into blocks")
    for i in range(x.ndim):
        if x.shape[i] != scale.shape[i]:
            scale = scale.repeat(x.shape[i] // scale.shape[i], axis=i)
    return scale


KERNELS: dict[str, Kernel] = {
    "ACTIVATION": activation,
    "ATTENTION_INPUT": attention.attention,
    "ATTENTION_OUTPUT": identity,
    "CAST": cast_,
    "CONCATENATION": movement.concatenation,
    "CONSTANT": constant,
    "DEQUANTIZE": dequantize,
    "ELEMENTWISE": elementwise,
    "FILL": movement.fill,
    "GATHER": movement.gather,
    "IDENTITY": identity,
    "KV_CACHE_UPDATE": attention.kv_cache_update,
    "MATRIX_MULTIPLY": matrix_multiply,
    "NORMALIZATION": normalization,
    "QUANTIZE": quantize,
    "REDUCE": reduce,
    "ROTARY_EMBEDDING": attention.rotary_embedding,
    "SCATTER": movement.scatter,
    "SELECT": select,
    "SHAPE": movement.shape,
    "SHUFFLE": movement.shuffle,
    "SLICE": movement.slice_,
    "SOFTMAX": softmax_,
    "SQUEEZE": movement.squeeze,
    "UNARY": unary,
    "UNSQUEEZE": movement.unsqueeze,
}
