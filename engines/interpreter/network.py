"""A TensorRT network as plain data: tensors, layers in an order in which they can run, constants as arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ...errors import OneVisionError
from ...precision.codes import FP4, INT4, unpack

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the network. dtype: TensorRT's, as numpy or ml_dtypes has it. shape: -1 where free."""

    name: str
    dtype: np.dtype
    shape: Shape
    dimensions: tuple[str, ...] = ()  # names of the free ones of an input, empty for others
    is_shape: bool = False  # an input whose values, not only its shape, decide the shapes of others


@dataclass(frozen=True, slots=True)
class Constant:
    """Values of a constant layer. data: uint8, as TensorRT stores them, 4-bit codes two to a byte, low half first."""

    data: np.ndarray
    dtype: np.dtype
    shape: Shape

    def array(self) -> np.ndarray:
        """The values in their shape; 4-bit codes one to a byte."""
        codes = next((codes for codes in (INT4, FP4) if codes.numpy == self.dtype), None)
        if codes is not None:
            return unpack(self.data, codes, self.shape)
        return self.data.view(self.dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. type: the name of its trt.LayerType. inputs: tensors by name, None for one that is not given.

    attributes: what its class adds to trt.ILayer, enumerations by name. node: the ONNX node it was made from, as
    the parser recorded it, or "".
    """

    type: str
    name: str
    inputs: tuple[str | None, ...]
    outputs: tuple[Tensor, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    node: str = ""
    constant: Constant | None = None

    @property
    def stage(self) -> str:
        """The module it belongs to, such as model/layers.0/self_attn: its ONNX node without its last part."""
        return self.node.rpartition("/")[0]

    def error(self, what: str) -> OneVisionError:
        """An error that names the layer."""
        return OneVisionError(f"layer {self.name} ({self.type}): {what}")


@dataclass(frozen=True)
class Network:
    """A whole network. layers: every layer after those that make its inputs."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    layers: tuple[Layer, ...]

    @cached_property
    def by_output(self) -> dict[str, Layer]:
        """The layer that makes each tensor, by the tensor's name."""
        return {tensor.name: layer for layer in self.layers for tensor in layer.outputs}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        made = (tensor for layer in self.layers for tensor in layer.outputs)
        return {tensor.name: tensor for tensor in (*self.inputs, *made)}

    @cached_property
    def unused_inputs(self) -> tuple[str, ...]:
        """Inputs that no layer reads: what the parser dropped shows here."""
        used = {name for layer in self.layers for name in layer.inputs}
        return tuple(tensor.name for tensor in self.inputs if tensor.name not in used)

    @classmethod
    def read(cls, trt: Any, network: Any) -> "Network":
        """Read a trt.INetworkDefinition. trt: the module it is from (tensorrt or tensorrt_rtx_bindings).

        Constants are copied (4-bit codes as packed), so the network, its builder and its parser may go. Raises
        OneVisionError for a network that is not strongly typed, and for layer types, attribute values and tensor types
        that the interpreter does not know.
        """
        from .reading import read

        return cls(*read(trt, network))


def in_order(layers: list[Layer], inputs: tuple[Tensor, ...]) -> tuple[Layer, ...]:
    """The layers, each after those that make its inputs, else as they came (the parser's order is not always one).

    Raises OneVisionError for a tensor that nothing makes, and for a cycle.
    """
    known = {tensor.name for tensor in inputs}
    made = {tensor.name: index for index, layer in enumerate(layers) for tensor in layer.outputs}
    placed: set[int] = set()
    order: list[Layer] = []
    for start in range(len(layers)):
        path, entered = [start], set()
        while path:
            index = path[-1]
            layer = layers[index]
            wanted = [name for name in layer.inputs if name is not None and name not in known]
            for name in wanted:
                if name not in made:
                    raise layer.error(f"nothing makes its input {name}")
            missing = [made[name] for name in wanted if made[name] not in placed]
            if index in placed or not missing:
                path.pop()
                if index not in placed:
                    placed.add(index)
                    order.append(layer)
            elif index in entered:
                raise layer.error("its inputs depend on its own output")
            else:
                entered.add(index)
                path.extend(reversed(missing))
    return tuple(order)
