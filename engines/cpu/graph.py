"""An exported graph, read for its patterns: who makes a value, and what its constants hold."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from ...errors import OneVisionError
from ...precision.codes import FP4, FP8, INT4, unpack

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_FP4_VALUES = np.arange(16, dtype=np.uint8).view(FP4.numpy).astype(np.float32)  # by code


class MismatchError(OneVisionError):
    """A graph is not made of the patterns that the cpu engine knows."""


class Graph:
    """The nodes of a graph file by what they make. Weights stay in their file until they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's exceptions share no useful base
            raise OneVisionError(f"{path} is not an ONNX graph: {str(error).splitlines()[0]}") from error
        graph = self.model.graph
        self._makers = {output: node for node in graph.node for output in node.output}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._data: dict[str, np.ndarray] = {}

    def maker(self, value: str) -> NodeProto | None:
        """The node that makes a value; casts between floats are looked through."""
        node = self._makers.get(value)
        while node is not None and node.op_type == "Cast" and attribute(node, "to") in _FLOATS:
            source = self._makers.get(node.input[0])
            if source is None:  # an input's own cast
                return node
            node = source
        return node

    def made_by(self, value: str, *kinds: str) -> NodeProto:
        """The node that makes a value, which is one of `kinds`. Raises MismatchError."""
        node = self.maker(value)
        if node is None or node.op_type not in kinds:
            found = "an input or constant" if node is None else f"made by {node.op_type}"
            raise MismatchError(
                f"{self.path}: {value} is {found} where the cpu engine knows {' or '.join(kinds)} alone"
            )
        return node

    def is_made_by(self, value: str, *kinds: str) -> bool:
        """Whether a node of one of these kinds makes a value."""
        node = self.maker(value)
        return node is not None and node.op_type in kinds

    def root(self, value: str) -> str:
        """A value's name before casts between floats."""
        node = self._makers.get(value)
        while node is not None and node.op_type == "Cast" and attribute(node, "to") in _FLOATS:
            value = node.input[0]
            node = self._makers.get(value)
        return value

    def is_constant(self, value: str) -> bool:
        """Whether a value is stored with the graph."""
        return value in self._constants

    def dtype(self, value: str) -> int:
        """The ONNX type of a constant."""
        return self._constants[value].data_type

    def shape(self, value: str) -> tuple[int, ...]:
        """The shape of a constant."""
        return tuple(self._constants[value].dims)

    def constant(self, value: str) -> np.ndarray:
        """What a constant holds: floats as float32, 4-bit codes as int8, others as they are. Raises MismatchError."""
        if value not in self._constants:
            raise MismatchError(f"{self.path}: {value} is computed where the cpu engine knows constants alone")
        tensor = self._constants[value]
        stored = self._stored(tensor)
        kind, shape = tensor.data_type, tuple(tensor.dims)
        if kind == FP4.onnx_type:
            return _FP4_VALUES[unpack(stored, FP4, shape).view(np.uint8)]
        if kind == INT4.onnx_type:  # by bits: numpy converts an added dtype one call at a time
            return (unpack(stored, INT4, shape).view(np.uint8) ^ np.uint8(8)).view(np.int8) - np.int8(8)
        values = stored.view(helper.tensor_dtype_to_np_dtype(kind)).reshape(shape)
        return values.astype(np.float32) if kind in _FLOATS or kind == FP8.onnx_type else values

    def number(self, value: str) -> float:
        """A constant that holds one number."""
        return float(self.constant(value).reshape(-1)[0])

    def _stored(self, tensor: TensorProto) -> np.ndarray:
        """A constant's bytes."""
        if tensor.data_location != TensorProto.EXTERNAL:
            if tensor.raw_data:
                return np.frombuffer(tensor.raw_data, np.uint8)
            return np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(-1).view(np.uint8)
        info = ExternalDataInfo(tensor)
        if info.location not in self._data:
            file = self.path.parent / info.location
            if file.parent != self.path.parent or not file.is_file():
                raise OneVisionError(f"{self.path}: its weights are in {info.location!r}, which is no file beside it")
            self._data[info.location] = np.memmap(file, np.uint8, "r")
        start, count = info.offset or 0, info.length
        data = self._data[info.location]
        if count is None or start + count > len(data):
            raise OneVisionError(f"{self.path}: {tensor.name} lies beyond the end of {info.location}")
        return data[start : start + count]


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """A node's attribute, or the default where it has none."""
    for found in node.attribute:
        if found.name == name:
            return helper.get_attribute_value(found)
    return default


def sides(node: NodeProto) -> Iterator[tuple[str, str]]:
    """Both inputs of a commutative node, in either order."""
    first, second = node.input[0], node.input[1]
    yield first, second
    yield second, first
