"""Reading TensorRT's objects: the only file that touches them. What it does not know it refuses by name."""

import ctypes
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from ...errors import OneVisionError
from ...precision.codes import FP4, FP8, INT4
from .network import Constant, Layer, Shape, Tensor, in_order

# trt.DataType by name. E8M0 is left out: nothing here computes with it.
DTYPES: dict[str, np.dtype] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP8": FP8.numpy,
    "FP4": FP4.numpy,
    "INT4": INT4.numpy,
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_BITS = {"INT4": 4, "FP4": 4}


def read(trt: Any, network: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Layer, ...]]:
    """Inputs, outputs and ordered layers of a trt.INetworkDefinition; see Network.read."""
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    flag = getattr(flags, "STRONGLY_TYPED", None)
    if flag is not None and not network.get_flag(flag):
        raise OneVisionError("the network is not strongly typed, so TensorRT chooses its types when it builds")
    inputs = tuple(_input(network.get_input(i)) for i in range(network.num_inputs))
    outputs = tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs))
    layers = [_layer(trt, network.get_layer(i)) for i in range(network.num_layers)]
    return inputs, outputs, in_order(layers, inputs)


def _tensor(tensor: Any) -> Tensor:
    name = tensor.dtype.name
    if name not in DTYPES:
        raise OneVisionError(f"tensor {tensor.name} is {name}, which the interpreter does not know")
    if len(tensor.shape) < 0:  # pragma: no cover - TensorRT's mark of an invalid shape
        raise OneVisionError(f"tensor {tensor.name} has no shape: the network is invalid")
    return Tensor(tensor.name, DTYPES[name], tuple(tensor.shape))


def _input(tensor: Any) -> Tensor:
    plain = _tensor(tensor)
    names = tuple(tensor.get_dimension_name(axis) or "" for axis in range(len(plain.shape)))
    return Tensor(plain.name, plain.dtype, plain.shape, names, bool(tensor.is_shape_tensor))


def _layer(trt: Any, layer: Any) -> Layer:
    kind, name, metadata = layer.type.name, layer.name, layer.metadata or ""
    if kind not in _READERS:
        raise OneVisionError(f"layer {name} is a {kind}, which the interpreter does not know")
    class_name, reader = _READERS[kind]
    given = [layer.get_input(i) for i in range(layer.num_inputs)]
    inputs = tuple(None if tensor is None else tensor.name for tensor in given)
    outputs = tuple(_tensor(layer.get_output(i)) for i in range(layer.num_outputs))
    # The bindings give every layer as a plain ILayer; its class is what its type says.
    layer.__class__ = getattr(trt, class_name)
    attributes = reader(layer)
    constant = attributes.pop("constant", None)
    node = metadata.removeprefix("[ONNX Layer: ").removesuffix("]") if metadata.startswith("[ONNX Layer: ") else ""
    return Layer(kind, name, inputs, outputs, attributes, node, constant)


def _dims(value: Any) -> Shape | None:
    """Dimensions, or None where they come as an input or were not set."""
    return None if value is None else tuple(value)


def _axes(mask: int) -> Shape:
    """The axes of a bit mask."""
    return tuple(axis for axis in range(mask.bit_length()) if mask >> axis & 1)


def _nothing(layer: Any) -> dict[str, Any]:
    return {}


def _constant(layer: Any) -> dict[str, Any]:
    dtype = layer.get_output(0).dtype.name
    shape = tuple(layer.shape)
    return {"constant": Constant(_bytes(layer, dtype, int(np.prod(shape, dtype=np.int64))), DTYPES[dtype], shape)}


def _bytes(layer: Any, dtype: str, count: int) -> np.ndarray:
    """A copy of a constant's memory: uint8 [n]."""
    weights = layer.weights
    nbytes = (count * _BITS.get(dtype, 8 * DTYPES[dtype].itemsize) + 7) // 8
    if isinstance(weights, np.ndarray):
        data = np.ascontiguousarray(weights).reshape(-1).view(np.uint8).copy()
    else:
        # numpy has no such type, and trt.Weights does not tell its pointer: it is read from the C++ object behind
        # the Python one, nvinfer1::Weights {int32 type, void* values, int64 count}, after its type and its count.
        fields = ctypes.c_uint64 * 3
        address = ctypes.c_uint64.from_address(id(weights) + object.__basicsize__).value
        kind, pointer, size = fields.from_address(address)
        if kind & 0xFFFFFFFF != weights.dtype.value or size != weights.size or size != count:
            raise OneVisionError(f"layer {layer.name}: this version of TensorRT keeps {dtype} weights in another way")
        data = np.frombuffer(ctypes.string_at(pointer, nbytes), np.uint8) if count else np.empty(0, np.uint8)
    if data.nbytes != nbytes:
        raise OneVisionError(f"layer {layer.name}: {data.nbytes} bytes of weights where {count} {dtype} take {nbytes}")
    return data


def _operation(layer: Any) -> dict[str, Any]:
    return {"op": layer.op.name}


def _activation(layer: Any) -> dict[str, Any]:
    # `type` is the activation's once the layer has its class.
    return {"op": layer.type.name, "alpha": float(layer.alpha), "beta": float(layer.beta)}


def _attention(layer: Any) -> dict[str, Any]:
    attention = layer.attention
    for what in ("query_lengths", "normalization_quantize_scale"):
        if getattr(attention, what, None) is not None:
            raise OneVisionError(f"layer {layer.name}: attention with {what}, which the interpreter does not know")
    _only(layer.name, attention, "norm_op", "SOFTMAX")
    for form in ("query_form", "key_value_form"):
        _only(layer.name, attention, form, "PADDED_BHND")
    if getattr(attention, "num_ranks", 1) != 1:
        raise OneVisionError(f"layer {layer.name}: attention over several devices")
    causal = attention.causal_kind.name if hasattr(attention, "causal_kind") else None
    if causal is None:
        causal = "UPPER_LEFT" if attention.causal else "NONE"
    return {"causal": causal}


def _only(name: str, source: Any, attribute: str, wanted: str) -> None:
    """Refuse any value of an attribute but one. An older TensorRT that lacks the attribute has that one."""
    found = getattr(source, attribute, None)
    if found is not None and found.name != wanted:
        raise OneVisionError(f"layer {name}: {attribute} is {found.name}; the interpreter knows {wanted}")


def _kv_cache(layer: Any) -> dict[str, Any]:
    _only(layer.name, layer, "cache_mode", "LINEAR")
    _only(layer.name, layer, "update_form", "PADDED_BHND")
    if getattr(layer, "update_lengths", None) is not None:
        raise OneVisionError(f"layer {layer.name}: a cache update with lengths, which the interpreter does not know")
    return {}


def _fill(layer: Any) -> dict[str, Any]:
    _only(layer.name, layer, "operation", "LINSPACE")
    given = [layer.get_input(i) for i in range(layer.num_inputs)]
    return {
        "shape": _dims(layer.shape) if not given or given[0] is None else None,
        "alpha": layer.alpha,
        "beta": layer.beta,
    }


def _slice(layer: Any) -> dict[str, Any]:
    _only(layer.name, layer, "mode", "STRICT_BOUNDS")
    return {"axes": _dims(layer.axes), **{key: _dims(getattr(layer, key)) for key in ("start", "shape", "stride")}}


def _shuffle(layer: Any) -> dict[str, Any]:
    return {
        "first": tuple(layer.first_transpose),
        "reshape": _dims(layer.reshape_dims),
        "second": tuple(layer.second_transpose),
        "zero_is_placeholder": bool(layer.zero_is_placeholder),
    }


def _normalization(layer: Any) -> dict[str, Any]:
    if layer.num_groups != 1:
        raise OneVisionError(f"layer {layer.name}: normalisation in {layer.num_groups} groups")
    return {"axes": _axes(layer.axes), "epsilon": float(layer.epsilon)}


_Reader = Callable[[Any], dict[str, Any]]
_READERS: dict[str, tuple[str, _Reader]] = {
    "ACTIVATION": ("IActivationLayer", _activation),
    "ATTENTION_INPUT": ("IAttentionInputLayer", _attention),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _attention),
    "CAST": ("ICastLayer", _nothing),
    "CONCATENATION": ("IConcatenationLayer", lambda layer: {"axis": int(layer.axis)}),
    "CONSTANT": ("IConstantLayer", _constant),
    "DEQUANTIZE": ("IDequantizeLayer", lambda layer: {"axis": int(layer.axis)}),
    "ELEMENTWISE": ("IElementWiseLayer", _operation),
    "FILL": ("IFillLayer", _fill),
    "GATHER": (
        "IGatherLayer",
        lambda layer: {"axis": int(layer.axis), "mode": layer.mode.name, "batch": int(layer.num_elementwise_dims)},
    ),
    "IDENTITY": ("IIdentityLayer", _nothing),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", _kv_cache),
    "MATRIX_MULTIPLY": (
        "IMatrixMultiplyLayer",
        lambda layer: {"op0": layer.op0.name, "op1": layer.op1.name},
    ),
    "NORMALIZATION": ("INormalizationLayer", _normalization),
    "QUANTIZE": ("IQuantizeLayer", lambda layer: {"axis": int(layer.axis)}),
    "REDUCE": (
        "IReduceLayer",
        lambda layer: {"op": layer.op.name, "axes": _axes(layer.axes), "keep_dims": bool(layer.keep_dims)},
    ),
    "ROTARY_EMBEDDING": (
        "IRotaryEmbeddingLayer",
        lambda layer: {"interleaved": bool(layer.interleaved), "dim": int(layer.rotary_embedding_dim)},
    ),
    "SCATTER": ("IScatterLayer", lambda layer: {"axis": int(layer.axis), "mode": layer.mode.name}),
    "SELECT": ("ISelectLayer", _nothing),
    "SHAPE": ("IShapeLayer", _nothing),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "SOFTMAX": ("ISoftMaxLayer", lambda layer: {"axes": _axes(layer.axes)}),
    "SQUEEZE": ("ISqueezeLayer", _nothing),
    "UNARY": ("IUnaryLayer", _operation),
    "UNSQUEEZE": ("IUnsqueezeLayer", _nothing),
}
LAYER_TYPES = frozenset(_READERS)
