"""An ONNX graph on ONNX Runtime, one node at a time: every value of the graph, in its own type.

A whole session will not do as a reference: it keeps float32 between the nodes of a float16 graph, and its CPU provider
has no bfloat16 and no FP4. Here each node runs alone, in float32 where the graph says float16 or bfloat16, on the
values that the nodes before it gave, and each value is rounded once to the type that the graph gives it. That is what
a strongly typed engine is asked to do.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ...errors import OneVisionError
from ...precision.codes import FP4, FP8, INT4, encode
from .arithmetic import BFLOAT16, rounded, wide

_ERRORS_ONLY = 3


class Reference:
    """A graph of standard ONNX operators without subgraphs. It needs the packages of the `export` extra."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import onnx
        import onnx_ir as ir

        self._onnx, self._ir, self._path = onnx, ir, Path(path)
        self.graph = ir.load(self._path).graph
        self._types = self._inferred()
        self._sessions: dict[bytes, ort.InferenceSession] = {}
        self.inputs = [str(value.name) for value in self.graph.inputs]
        self.outputs = [str(value.name) for value in self.graph.outputs]
        self.constants: dict[str, Any] = {name: v.const_value for name, v in self.graph.initializers.items()}
        self.used = {value.name for node in self.graph for value in node.inputs if value is not None}

    def values(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every input and every node's outputs by name; arrays are never written to twice.

        Raises OneVisionError for a node that ONNX Runtime cannot run.
        """
        values = {name: inputs[name] for name in self.inputs}
        for node in self.graph:
            given = [None if value is None else self._value(values, str(value.name)) for value in node.inputs]
            values.update(self._run(node, given))
        return values

    def constant(self, name: str) -> np.ndarray:
        """An initializer, 4-bit codes one to a byte."""
        return np.asarray(self.constants[name].numpy())

    def _value(self, values: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        return values[name] if name in values else self.constant(name)

    def _inferred(self) -> dict[str, int]:
        """The ONNX type of every value."""
        model = self._onnx.load(self._path, load_external_data=False)
        graph = self._onnx.shape_inference.infer_shapes(model).graph
        return {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}

    def _run(self, node: Any, given: list[np.ndarray | None]) -> dict[str, np.ndarray]:
        arrays = [None if array is None else _widened(array) for array in given]
        outputs = [str(value.name) for value in node.outputs]
        try:
            session = self._session(node, arrays, len(outputs))
            feeds = {f"i{k}": self._fed(array) for k, array in enumerate(arrays) if array is not None}
            results = session.run_with_ort_values(None, feeds)
        except OneVisionError:
            raise
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            raise OneVisionError(f"{self._path.name}: ONNX Runtime cannot run node {node.name}: {first}") from error
        return {name: self._read(name, result) for name, result in zip(outputs, results, strict=True)}

    def _read(self, name: str, result: Any) -> np.ndarray:
        if not self._types.get(name):
            raise OneVisionError(f"{self._path.name}: value {name} has no type that could be inferred")
        dtype = self._ir.DataType(self._types[name]).numpy()
        array = result.numpy()
        if dtype == FP8.numpy:
            return array.view(dtype)
        return rounded(array, dtype)

    def _fed(self, array: np.ndarray) -> Any:
        array = np.ascontiguousarray(array)
        if array.dtype == FP8.numpy:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), FP8.onnx_type)
        return ort.OrtValue.ortvalue_from_numpy(array)

    def _session(self, node: Any, arrays: list[np.ndarray | None], outputs: int) -> ort.InferenceSession:
        """A session of one node; nodes that differ only in names share theirs."""
        helper = self._onnx.helper
        proto = self._ir.to_proto(node)
        if any(attribute.HasField("g") for attribute in proto.attribute):
            raise OneVisionError(f"{self._path.name}: node {node.name} has a subgraph")
        for attribute in proto.attribute:
            if attribute.name in ("to", "output_dtype"):
                attribute.i = self._wide_type(attribute.i)
        proto.input[:] = [f"i{k}" if array is not None else "" for k, array in enumerate(arrays)]
        proto.output[:] = [f"o{k}" for k in range(outputs)]
        proto.ClearField("name")
        proto.ClearField("metadata_props")
        types = [0 if array is None else self._ir.DataType.from_numpy(array.dtype).value for array in arrays]
        key = proto.SerializeToString(deterministic=True) + bytes(types)
        if key not in self._sessions:
            given = [helper.make_tensor_value_info(f"i{k}", t, None) for k, t in enumerate(types) if t]
            made = [self._onnx.ValueInfoProto(name=f"o{k}") for k in range(outputs)]
            graph = helper.make_graph([proto], "node", given, made)
            opset = helper.make_opsetid("", self.graph.opset_imports[""])
            self._sessions[key] = _opened(helper.make_model(graph, opset_imports=[opset], ir_version=11))
        return self._sessions[key]

    def _wide_type(self, onnx_type: int) -> int:
        narrow = {self._ir.DataType.FLOAT16, self._ir.DataType.BFLOAT16}
        return int(self._ir.DataType.FLOAT) if onnx_type in narrow else onnx_type


def _opened(model: Any) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _widened(array: np.ndarray) -> np.ndarray:
    """The same numbers in a type that ONNX Runtime's CPU provider computes with."""
    if array.dtype in (np.dtype(np.float16), BFLOAT16):
        return wide(array)
    if array.dtype == INT4.numpy:
        return array.astype(np.int8)
    return encode(array.astype(np.float32), FP8) if array.dtype == FP4.numpy else array
