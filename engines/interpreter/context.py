"""The interface of a TensorRT engine over host memory: what runs an engine runs the interpreter, without a GPU.

Engine and ExecutionContext have the methods of trt.ICudaEngine and trt.IExecutionContext that a runtime needs, with
their names. Addresses are host addresses; the stream is ignored, and everything is done when a call returns.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import OneVisionError
from .interpreter import Interpreter
from .kernels import KERNELS, Kernel
from .movement import Given, present
from .network import Layer, Network, Shape, Tensor
from .reading import NAMES

# For one tensor: the smallest, the best and the largest shape, or values where the input is a shape tensor.
Bounds = tuple[Shape, Shape, Shape]
Profile = Mapping[str, Bounds]


class Engine:
    """A network as a built engine. profiles: shapes of every input with free dimensions, as an engine is built for."""

    def __init__(self, trt: Any, network: Network, profiles: Sequence[Profile] = ()) -> None:
        self._trt, self.network, self._profiles = trt, network, list(profiles)
        self._tensors = {tensor.name: tensor for tensor in (*network.inputs, *network.outputs)}
        self._inputs = {tensor.name for tensor in network.inputs}
        self.interpreter = Interpreter(network)

    @property
    def num_io_tensors(self) -> int:
        """Inputs and outputs together."""
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        """At least one: without any, every shape is taken."""
        return max(1, len(self._profiles))

    @property
    def device_memory_size_v2(self) -> int:
        """Bytes of scratch memory that the caller must provide: none."""
        return 0

    def get_tensor_name(self, index: int) -> str:
        """Inputs first, then outputs."""
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        """trt.TensorIOMode of a tensor."""
        return self._trt.TensorIOMode.INPUT if self.tensor(name).name in self._inputs else self._trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        """trt.DataType of a tensor."""
        return getattr(self._trt.DataType, NAMES[self.tensor(name).dtype])

    def get_tensor_shape(self, name: str) -> Shape:
        """The network's shape, -1 where it is free."""
        return self.tensor(name).shape

    def get_tensor_location(self, name: str) -> Any:
        """trt.TensorLocation: shape tensors are read by the host before anything runs."""
        location = self._trt.TensorLocation
        return location.HOST if self.tensor(name).is_shape else location.DEVICE

    def get_tensor_profile_shape(self, name: str, index: int) -> list[Shape]:
        """The smallest, the best and the largest shape of an input in a profile."""
        tensor = self.tensor(name)
        if not 0 <= index < self.num_optimization_profiles:
            raise OneVisionError(f"profile {index} of {self.num_optimization_profiles}")
        profile = self._profiles[index] if self._profiles else {}
        if name in profile and not tensor.is_shape:
            return list(profile[name])
        return [tensor.shape] * 3

    def get_tensor_profile_values(self, index: int, name: str) -> list[Shape]:
        """The smallest, the best and the largest values of a shape tensor in a profile; empty for other inputs."""
        profile = self._profiles[index] if self._profiles else {}
        return list(profile[name]) if self.tensor(name).is_shape and name in profile else []

    def get_aliased_input_tensor(self, name: str) -> str:
        """The input whose memory an output shares, or "": caches that KV_CACHE_UPDATE writes."""
        layer = self.network.by_output.get(name)
        cached = layer is not None and layer.type == "KV_CACHE_UPDATE"
        return (layer.inputs[0] or "") if layer is not None and cached else ""

    def is_shape_inference_io(self, name: str) -> bool:
        """Whether a tensor's values decide shapes."""
        return self.tensor(name).is_shape

    def create_execution_context(self) -> "ExecutionContext":
        """A context of its own shapes and addresses; contexts share what depends on constants alone."""
        return ExecutionContext(self)

    def tensor(self, name: str) -> Tensor:
        """An input or output. Raises OneVisionError for any other name."""
        if name not in self._tensors:
            raise OneVisionError(f"the engine has no input or output {name}")
        return self._tensors[name]

    def check_profile(self, index: int, name: str, values: Shape) -> None:
        """Refuse a shape, or a shape tensor's values, outside a profile."""
        profile = self._profiles[index] if self._profiles else {}
        if name not in profile:
            return
        low, _, high = profile[name]
        if len(low) != len(values) or not all(a <= v <= b for a, v, b in zip(low, values, high, strict=True)):
            raise OneVisionError(f"{name}: {values} is outside profile {index}, from {low} to {high}")


class ExecutionContext:
    """Shapes and addresses of one use of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._shapes_only = Interpreter(engine.network, 0, SHAPE_KERNELS)
        self._shapes = {t.name: t.shape for t in engine.network.inputs if -1 not in t.shape}
        self._addresses: dict[str, int] = {}
        self.active_optimization_profile = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        """Choose a profile. Raises OneVisionError for one that the engine has not."""
        if not 0 <= index < self.engine.num_optimization_profiles:
            raise OneVisionError(f"profile {index} of {self.engine.num_optimization_profiles}")
        self.active_optimization_profile = index
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        """Give an input its shape. Raises OneVisionError for one that its tensor or the profile does not allow."""
        tensor, sizes = self.engine.tensor(name), tuple(int(size) for size in shape)
        fits = len(sizes) == len(tensor.shape)
        if not fits or any(m not in (-1, n) or n < 0 for m, n in zip(tensor.shape, sizes, strict=True)):
            raise OneVisionError(f"{name} cannot take shape {sizes}: it is {tensor.shape}")
        if not tensor.is_shape:
            self.engine.check_profile(self.active_optimization_profile, name, sizes)
        self._shapes[name] = sizes
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        """Where an input or output lies. A shape tensor must hold its values when shapes are asked for."""
        self.engine.tensor(name)
        self._addresses[name] = int(pointer)
        return True

    def get_tensor_address(self, name: str) -> int:
        """The address given, or 0."""
        return self._addresses.get(name, 0)

    def get_tensor_shape(self, name: str) -> Shape:
        """An input's shape as set; an output's as it follows, or the network's while it cannot be told."""
        tensor = self.engine.tensor(name)
        if name in {t.name for t in self.engine.network.inputs}:
            return self._shapes.get(name, tensor.shape)
        if -1 not in tensor.shape:
            return tensor.shape
        return tensor.shape if self.infer_shapes() else self._outputs()[name].shape

    def infer_shapes(self) -> list[str]:
        """The inputs whose shapes, or whose values where those decide shapes, are not given yet; empty when all are."""
        return [
            tensor.name
            for tensor in self.engine.network.inputs
            if tensor.name not in self._shapes or (tensor.is_shape and not self._addresses.get(tensor.name))
        ]

    @property
    def all_binding_shapes_specified(self) -> bool:
        """Whether every input has its shape."""
        return all(tensor.name in self._shapes for tensor in self.engine.network.inputs)

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Run on what lies at the addresses; outputs are written to theirs.

        Raises OneVisionError where a shape or an address is missing, where a cache's output is not bound to
        its input's address, and for what the interpreter refuses.
        """
        missing = self.infer_shapes() or [
            t.name
            for t in (*self.engine.network.inputs, *self.engine.network.outputs)
            if not self._addresses.get(t.name)
        ]
        if missing:
            raise OneVisionError(f"no shape or no address was given for {', '.join(missing)}")
        for tensor in self.engine.network.outputs:
            past = self.engine.get_aliased_input_tensor(tensor.name)
            if past and self._addresses[past] != self._addresses[tensor.name]:
                raise OneVisionError(f"{tensor.name} is updated in place: bind it to the address of {past}")
        inputs = {tensor.name: self._memory(tensor, self._shapes[tensor.name]) for tensor in self.engine.network.inputs}
        for name, array in inputs.items():
            if self.engine.tensor(name).is_shape:
                values = tuple(int(value) for value in array.reshape(-1))
                self.engine.check_profile(self.active_optimization_profile, name, values)
        for name, result in self.engine.interpreter.run(inputs).items():
            target = self._memory(self.engine.tensor(name), result.shape)
            if not np.shares_memory(target, result):
                target[...] = result
        return True

    def _memory(self, tensor: Tensor, shape: Shape) -> np.ndarray:
        """The memory at a tensor's address, as an array that writes through."""
        count = int(np.prod(shape, dtype=np.int64))
        buffer = (ctypes.c_uint8 * (count * tensor.dtype.itemsize)).from_address(self._addresses[tensor.name])
        return np.ndarray(shape, tensor.dtype, memoryview(buffer))

    def _outputs(self) -> dict[str, np.ndarray]:
        """Arrays of the shapes that the outputs will have: only integers that shapes are made of are computed."""
        inputs = {}
        for tensor in self.engine.network.inputs:
            shape = self._shapes[tensor.name]
            inputs[tensor.name] = self._memory(tensor, shape) if tensor.is_shape else empty(shape, tensor.dtype)
        return self._shapes_only.run(inputs)


def empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Zeros of any shape in the memory of one."""
    return np.broadcast_to(np.zeros((), dtype), shape)


@dataclass(frozen=True, slots=True)
class _ShapeOnly:
    """A kernel whose float output is only a shape."""

    kernel: Kernel

    def __call__(self, layer: Layer, inputs: Given) -> np.ndarray:
        if layer.outputs[0].dtype.kind in "ib" and layer.type not in ("KV_CACHE_UPDATE", "SCATTER", "QUANTIZE"):
            return self.kernel(layer, inputs)
        rule = _SHAPES.get(layer.type)
        shape = self.kernel(layer, inputs).shape if rule is None else rule(layer, inputs)
        return empty(shape, layer.outputs[0].dtype)


def _same(layer: Layer, inputs: Given) -> Shape:
    return present(layer, inputs, 0).shape


def _broadcast(layer: Layer, inputs: Given) -> Shape:
    return np.broadcast_shapes(*(array.shape for array in inputs if array is not None))


def _product(layer: Layer, inputs: Given) -> Shape:
    first, second = (present(layer, inputs, i).shape for i in range(2))
    if layer.attributes["op0"] == "TRANSPOSE":
        first = (*first[:-2], first[-1], first[-2])
    if layer.attributes["op1"] == "TRANSPOSE":
        second = (*second[:-2], second[-1], second[-2])
    if "VECTOR" in (layer.attributes["op0"], layer.attributes["op1"]):
        return KERNELS["MATRIX_MULTIPLY"](layer, inputs).shape
    return (*np.broadcast_shapes(first[:-2], second[:-2]), first[-2], second[-1])


def _heads(layer: Layer, inputs: Given) -> Shape:
    return (*present(layer, inputs, 0).shape[:3], present(layer, inputs, 2).shape[3])


def _declared(layer: Layer, inputs: Given) -> Shape:
    assert layer.constant is not None
    return layer.constant.shape


_SAME = ("ACTIVATION", "CAST", "DEQUANTIZE", "QUANTIZE", "KV_CACHE_UPDATE", "NORMALIZATION", "ROTARY_EMBEDDING")
_SHAPES = {
    **dict.fromkeys((*_SAME, "SCATTER", "SOFTMAX", "UNARY"), _same),
    "ATTENTION_INPUT": _heads,
    "CONSTANT": _declared,
    "ELEMENTWISE": _broadcast,
    "MATRIX_MULTIPLY": _product,
    "SELECT": _broadcast,
}
SHAPE_KERNELS: dict[str, Kernel] = {kind: _ShapeOnly(kernel) for kind, kernel in KERNELS.items()}
