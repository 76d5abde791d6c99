"""How far a layer's output may be from ONNX Runtime's where both computed the same thing.

Errors are absolute, one per value of a tensor; None stands for a tensor that must be equal. Where both sides round one
result of the same inputs once (additions, products, quotients, square roots, casts, codes), nothing may differ. Sums
in float32 have an order, and both sides choose theirs: the difference of two of n terms stays below
8 sqrt(n) 2^-24 times the sum of the magnitudes (the probabilistic bound of Higham and Mary, "A New Approach to
Probabilistic Rounding Error Analysis", 2019, with lambda = 4, for each of the two). Elementary functions may differ by
some units in the last place of float32. The parser makes several layers of some ONNX nodes; then what each rounds to
its own type goes through the layers after it.
"""

import math
from collections.abc import Sequence

import numpy as np

from .arithmetic import BFLOAT16, FLOATS, softmax, wide
from .attention import masked
from .kernels import KERNELS, oriented
from .network import Layer

Error = np.ndarray | None
Arrays = Sequence[np.ndarray | None]
Errors = Sequence[Error]

# Half a unit in the last place of 1, and of the smallest numbers.
ROUNDOFF = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float16): 2.0**-11, BFLOAT16: 2.0**-8}
_SUBNORMAL = {np.dtype(np.float32): 2.0**-149, np.dtype(np.float16): 2.0**-25, BFLOAT16: 2.0**-134}
_U = np.float32(2.0**-24)
_FUNCTION = 8 * _U  # of elementary functions, each side within four units

_MOVES = {"SHUFFLE", "SLICE", "CONCATENATION", "SQUEEZE", "UNSQUEEZE", "IDENTITY", "ATTENTION_OUTPUT"}


def error(layer: Layer, inputs: Arrays, errors: Errors, output: np.ndarray, inner: bool = False) -> Error:
    """The error of a layer's output, for those of its inputs.

    inner: ONNX Runtime has no such value, so what the layer rounds it does not round.
    """
    if output.dtype not in FLOATS:
        return None
    if layer.type in _SUMS:
        return _SUMS[layer.type](layer, inputs, errors, output) + rounding(output)
    if all(e is None for e in errors):
        own = _own(layer, inputs, output)
        return rounding(output) if own is None and inner and _rounds(layer, inputs, output) else own
    if layer.type in _MOVES:
        moved = [e if e is not None else _zeros(x) for x, e in zip(inputs, errors, strict=True)]
        moved[1:] = inputs[1:] if layer.type != "CONCATENATION" else moved[1:]
        return KERNELS[layer.type](layer, moved)
    if layer.type == "CAST":
        given = _error(inputs, errors, 0)
        return given + rounding(output) if _narrows(inputs, output) else given
    if layer.type == "ELEMENTWISE":
        return _elementwise(layer, inputs, errors, output) + rounding(output)
    if layer.type == "UNARY" and layer.attributes["op"] == "SQRT":
        return _error(inputs, errors, 0) / (2 * np.maximum(wide(output), np.float32(1e-30))) + rounding(output)
    raise layer.error("no bound is known for its output from inputs that are rounded already")


def _rounds(layer: Layer, inputs: Arrays, output: np.ndarray) -> bool:
    """Whether a layer makes new floats."""
    if layer.type == "CAST":
        return _narrows(inputs, output)
    return layer.type in ("ELEMENTWISE", "UNARY", "ACTIVATION", "DEQUANTIZE")


def rounding(output: np.ndarray) -> np.ndarray:
    """What one rounding to the tensor's type may change."""
    relative = np.abs(wide(output)) * np.float32(ROUNDOFF[output.dtype])
    return np.maximum(relative, np.float32(_SUBNORMAL[output.dtype]))


def _own(layer: Layer, inputs: Arrays, output: np.ndarray) -> Error:
    """Of what is not a sum, of equal inputs."""
    if layer.type == "UNARY" and layer.attributes["op"] not in ("SQRT", "ABS", "NEG", "FLOOR", "CEIL", "ROUND", "SIGN"):
        return _FUNCTION * np.maximum(np.abs(wide(output)), 1) + rounding(output)
    if layer.type == "ACTIVATION" and layer.attributes["op"] not in ("RELU", "CLIP"):
        # GELU at large negative values is the small difference of large ones.
        return _FUNCTION * np.maximum(np.abs(_array(inputs, 0)), 1) + rounding(output)
    return _FUNCTION * np.abs(wide(output)) + rounding(output) if layer.attributes.get("op") == "POW" else None


def _array(inputs: Arrays, index: int) -> np.ndarray:
    """An input in float32."""
    array = inputs[index]
    assert array is not None
    return wide(array)


def _zeros(x: np.ndarray | None) -> np.ndarray | None:
    return None if x is None else np.zeros(x.shape, np.float32)


def _error(inputs: Arrays, errors: Errors, index: int) -> np.ndarray:
    found = errors[index]
    return np.zeros(_array(inputs, index).shape, np.float32) if found is None else found


def _narrows(inputs: Arrays, output: np.ndarray) -> bool:
    given = inputs[0]
    assert given is not None
    return ROUNDOFF[output.dtype] > ROUNDOFF.get(given.dtype, 0)


def _elementwise(layer: Layer, inputs: Arrays, errors: Errors, output: np.ndarray) -> np.ndarray:
    a, b = np.abs(_array(inputs, 0)), np.abs(_array(inputs, 1))
    first, second = _error(inputs, errors, 0), _error(inputs, errors, 1)
    op = layer.attributes["op"]
    if op == "PROD":
        return a * second + b * first
    if op == "DIV":
        return first / b + np.abs(wide(output)) * second / b
    if op in ("SUM", "SUB", "MAX", "MIN"):
        return first + second
    raise layer.error("no bound is known for its output from inputs that are rounded already")


def _order(terms: int) -> np.float32:
    """Relative to the sum of magnitudes: two float32 sums of `terms` terms in different orders."""
    return np.float32(8 * math.sqrt(max(terms, 1))) * _U


def _matrix_multiply(layer: Layer, inputs: Arrays, errors: Errors, output: np.ndarray) -> np.ndarray:
    def operand(values: np.ndarray, index: int) -> np.ndarray:
        return np.abs(oriented(layer, values, f"op{index}"))

    a, b = (operand(_array(inputs, i), i) for i in range(2))
    result = _order(a.shape[-1]) * (a @ b)
    if errors[0] is not None:
        result = result + operand(errors[0], 0) @ b
    if errors[1] is not None:
        result = result + a @ operand(errors[1], 1)
    return result.reshape(output.shape)


def _reduce(layer: Layer, inputs: Arrays, errors: Errors, output: np.ndarray) -> np.ndarray:
    axes, keep = layer.attributes["axes"], layer.attributes["keep_dims"]
    x = np.abs(_array(inputs, 0))
    terms = math.prod(x.shape[axis] for axis in axes)
    spread = x * _order(terms) + _error(inputs, errors, 0)
    if layer.attributes["op"] in ("MAX", "MIN"):
        return _error(inputs, errors, 0).max(axes, keepdims=keep)
    if layer.attributes["op"] == "PROD":
        return np.abs(wide(output)) * _order(terms)
    total = spread.sum(axes, keepdims=keep)
    return total / np.float32(terms) if layer.attributes["op"] == "AVG" else total


def _softmax(layer: Layer, inputs: Arrays, errors: Errors, output: np.ndarray) -> np.ndarray:
    axes, x = layer.attributes["axes"], _array(inputs, 0)
    terms = math.prod(x.shape[axis] for axis in axes)
    shifted = _error(inputs, errors, 0).max(axes, keepdims=True) * 2
    # The exponent is rounded, in float32, relative to its own magnitude; e^-104 is zero.
    exponents = np.minimum(np.abs(x - x.max(axes, keepdims=True)), 104) * _U * 2
    return wide(output) * (shifted + exponents + _order(terms) + _FUNCTION)


def _normalization(layer: Layer, inputs: Arrays, errors: Errors, output: np.ndarray) -> np.ndarray:
    axes = layer.attributes["axes"]
    x, scale, bias = (_array(inputs, i) for i in range(3))
    terms = math.prod(x.shape[axis] for axis in axes)
    deviation = np.sqrt(x.var(axes, keepdims=True) + np.float32(layer.attributes["epsilon"]))
    absolute = _order(terms) * np.abs(x).max(axes, keepdims=True) + 2 * _error(inputs, errors, 0)
    return absolute / deviation * np.abs(scale) + _order(terms) * np.abs(wide(output) - bias) + _FUNCTION * np.abs(bias)


def _attention(layer: Layer, inputs: Arrays, errors: Errors, output: np.ndarray) -> np.ndarray:
    """Of q and k that were scaled and rounded before.

    Errors of their values are independent, so scores collect roots of squares, four times which are allowed, as in the
    sums; the error of the rounded scale, the same for all values, is twice one rounding of each score. A change of d in
    scores changes the average of values by at most 2 d of their average magnitude.
    """
    q, k, v = (_array(inputs, i) for i in range(3))
    groups = q.shape[1] // k.shape[1]
    k, v, key_error = (x.repeat(groups, axis=1) for x in (k, v, _error(inputs, errors, 1)))
    query_error = _error(inputs, errors, 0)
    squares = np.square(q) @ np.square(key_error).swapaxes(2, 3) + np.square(query_error) @ np.square(k).swapaxes(2, 3)
    terms = np.abs(q) @ np.abs(k).swapaxes(2, 3)
    scores = q @ k.swapaxes(2, 3)
    scale = np.float32(2 * ROUNDOFF[output.dtype] if squares.any() else 0) * np.abs(scores)
    change = 4 * np.sqrt(squares) + scale + _order(q.shape[3]) * terms + _FUNCTION
    scores = masked(layer, inputs, scores)
    change = np.where(np.isfinite(scores), change, np.float32(0))
    magnitude = softmax(scores) @ np.abs(v)
    return magnitude * (2 * change.max(-1, keepdims=True) + _order(k.shape[2]))


def _rotary(layer: Layer, inputs: Arrays, errors: Errors, output: np.ndarray) -> np.ndarray:
    x = np.abs(_array(inputs, 0)).max(-1, keepdims=True) * _FUNCTION
    return np.broadcast_to(x + 2 * _error(inputs, errors, 0).max(-1, keepdims=True), output.shape)


_SUMS = {
    "MATRIX_MULTIPLY": _matrix_multiply,
    "REDUCE": _reduce,
    "SOFTMAX": _softmax,
    "NORMALIZATION": _normalization,
    "ATTENTION_INPUT": _attention,
    "ROTARY_EMBEDDING": _rotary,
}
