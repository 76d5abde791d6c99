"""A parsed TensorRT network held against the contract and the plan of its bundle, before anything is compiled.

The parser drops inputs that it does not know what to do with and says nothing; it could widen weights or split
attention as silently. Each check names what it found. Nothing here needs a GPU.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..bundle import GraphSpec
from ..config import ModelConfig
from ..errors import OneVisionError
from ..precision import float_format
from ..precision.formats import FORMATS
from ..precision.plan import Plan, Precision
from .linears import linears


@dataclass(frozen=True, slots=True)
class Product:
    """What a Linear is in a network: types of its weights and of their scale, rows to a scale, codes of its input."""

    weights: str
    scale: str | None = None
    block: int = 0
    two_level: bool = False
    activation: str | None = None

    def __str__(self) -> str:
        text = f"{self.weights} weights"
        if self.scale:
            text += f" with {self.scale} scales, one for " + (f"{self.block} inputs" if self.block else "an output")
        return (
            text
            + (", scales of scales" if self.two_level else "")
            + (f", inputs rounded to {self.activation}" if self.activation else "")
        )


class ParsedNetwork:
    """A network that can be read: its layers as what they are, and which of them makes each tensor."""

    def __init__(self, trt: Any, network: Any) -> None:
        self.trt, self.network = trt, network
        self.kinds = trt.LayerType
        classes = {
            self.kinds.CONSTANT: trt.IConstantLayer,
            self.kinds.DEQUANTIZE: trt.IDequantizeLayer,
            self.kinds.QUANTIZE: trt.IQuantizeLayer,
        }
        self.layers = [network.get_layer(i) for i in range(network.num_layers)]
        for layer in self.layers:
            layer.__class__ = classes.get(layer.type, trt.ILayer)
        self.makers = {layer.get_output(i).name: layer for layer in self.layers for i in range(layer.num_outputs)}

    @property
    def inputs(self) -> list[Any]:
        """The tensors that the network is given."""
        return [self.network.get_input(i) for i in range(self.network.num_inputs)]

    @property
    def outputs(self) -> list[Any]:
        """The tensors that it gives."""
        return [self.network.get_output(i) for i in range(self.network.num_outputs)]

    def of_kind(self, kind: Any) -> list[Any]:
        """Its layers of a LayerType."""
        return [layer for layer in self.layers if layer.type == kind]

    def origin(self, tensor: Any) -> Any:
        """The layer that a tensor comes from, reshaping apart; None for an input of the network."""
        layer = self.makers.get(tensor.name)
        while layer is not None and layer.type == self.kinds.SHUFFLE:
            layer = self.makers.get(layer.get_input(0).name)
        return layer

    def linears(self) -> dict[str, tuple[Any, Any]]:
        """The products with constants, by the checkpoint's name: where the input comes from, and the matrix."""
        found = {}
        for layer in self.of_kind(self.kinds.MATRIX_MULTIPLY):
            x, matrix = (self.origin(tensor) for tensor in given(layer))
            constant = matrix
            if matrix is not None and matrix.type == self.kinds.DEQUANTIZE:
                constant = self.origin(matrix.get_input(0))
            if constant is not None and constant.type == self.kinds.CONSTANT:
                name = constant.get_output(0).name.removesuffix("_output")
                found[name.removesuffix(".weight")] = (x, matrix)
        return found

    def product(self, x: Any, matrix: Any) -> tuple[Product, int]:
        """What a Linear is, and how many inputs it has."""
        rounded = self.rounding(x)
        activation = None if rounded is None else _name(rounded.dtype)
        if matrix.type == self.kinds.CONSTANT:
            weights = matrix.get_output(0)
            return Product(_name(weights.dtype), activation=activation), weights.shape[0]
        weights, scale = given(matrix)[:2]
        rows = weights.shape[0]
        block = rows // scale.shape[0] if len(scale.shape) == 2 else 0
        scales = self.origin(scale)
        two_level = scales is not None and scales.type == self.kinds.DEQUANTIZE
        return Product(_name(weights.dtype), _name(scale.dtype), block, two_level, activation), rows

    def rounding(self, x: Any) -> Any:
        """The codes that an input is rounded to and given back from under one scale, a tensor; else None."""
        if x is None or x.type != self.kinds.DEQUANTIZE:
            return None
        quantize = self.origin(x.get_input(0))
        if quantize is None or quantize.type != self.kinds.QUANTIZE:
            return None
        scale = quantize.get_input(1)
        one = tuple(scale.shape) == () and scale.name == x.get_input(1).name
        return quantize.get_output(0) if one else None


def given(layer: Any) -> list[Any]:
    """The inputs of a layer that are there."""
    return [tensor for tensor in (layer.get_input(i) for i in range(layer.num_inputs)) if tensor is not None]


def check_network(parsed: ParsedNetwork, part: str, spec: GraphSpec, config: ModelConfig, plan: Plan) -> None:
    """Raise OneVisionError where a network is not its graph: an input that no layer reads, an input or output of
    another type or shape, attention that is not fused, a product that is not what the plan says."""
    _check_inputs_used(parsed, spec)
    _check_contract(parsed, spec)
    _check_attention(parsed, part, spec, config)
    _check_products(parsed, part, spec, config, plan)


def _check_inputs_used(parsed: ParsedNetwork, spec: GraphSpec) -> None:
    used = {tensor.name for layer in parsed.layers for tensor in given(layer)}
    if dropped := [tensor.name for tensor in parsed.inputs if tensor.name not in used]:
        raise OneVisionError(f"{spec.file}: the parser dropped the input {', '.join(dropped)}: no layer reads it")


def _check_contract(parsed: ParsedNetwork, spec: GraphSpec) -> None:
    for what, declared, tensors in (("input", spec.inputs, parsed.inputs), ("output", spec.outputs, parsed.outputs)):
        found = {t.name: (_name(t.dtype), tuple(t.shape)) for t in tensors}
        for tensor in declared:
            shape = tuple(-1 if isinstance(size, str) else size for size in tensor.shape)
            if found.get(tensor.name) != (tensor.dtype, shape):
                is_now = "missing" if tensor.name not in found else "{} {}".format(*found[tensor.name])
                raise OneVisionError(
                    f"{spec.file}: the {what} {tensor.name} is {is_now} in the network, not {tensor.dtype} {shape}"
                )
        if extra := sorted(set(found) - {tensor.name for tensor in declared}):
            raise OneVisionError(f"{spec.file}: the network has an {what} that the graph has not: {', '.join(extra)}")


def _check_attention(parsed: ParsedNetwork, part: str, spec: GraphSpec, config: ModelConfig) -> None:
    """Float32 has no fused attention in TensorRT."""
    wanted = config.vision.depth if part == "vision" else config.text.num_hidden_layers
    kinds = parsed.kinds
    found = len(parsed.of_kind(kinds.ATTENTION_INPUT)), len(parsed.of_kind(kinds.ATTENTION_OUTPUT))
    if spec.dtype != "fp32" and found != (wanted, wanted):
        raise OneVisionError(f"{spec.file}: {found[0]} attention layers of {wanted} are fused in the network")


def _check_products(parsed: ParsedNetwork, part: str, spec: GraphSpec, config: ModelConfig, plan: Plan) -> None:
    found, fmt = parsed.linears(), float_format(spec.dtype).onnx
    wanted = linears(part, config)
    if missing := [name for name in wanted if name not in found]:
        raise OneVisionError(f"{spec.file}: the network has no product with {missing[0]} ({len(missing)} missing)")
    for name in wanted:
        is_now, inputs = parsed.product(*found[name])
        should = expected(plan.precision(part, name, inputs), fmt)
        if is_now != should:
            raise OneVisionError(f"{spec.file}: {name} has {is_now} in the network; the plan says {should}")


def expected(precision: Precision, fmt: str) -> Product:
    """What a precision is in a network that computes in `fmt`, an ONNX type name."""
    activation = precision.activation
    if precision.format is None:
        return Product(fmt, activation=activation)
    form = FORMATS[precision.format]
    return Product(form.codes.name, fmt, form.block, form.two_level, activation)


def layer_counts(parsed: ParsedNetwork) -> dict[str, int]:
    """How many layers of each kind a network has, for the record."""
    return dict(sorted(Counter(layer.type.name for layer in parsed.layers).items()))


def _name(dtype: Any) -> str:
    """A TensorRT data type as ONNX spells it: float16, int8, fp4."""
    name = getattr(dtype, "name", str(dtype)).rsplit(".", 1)[-1].lower()
    return {"float": "float32", "half": "float16", "bf16": "bfloat16"}.get(name, name)
