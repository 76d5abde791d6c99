"""The full-precision model in stages, each a graph of its own whose weights are given when it runs.

A stage is made of the exporter's own modules, so that what is measured is what will be quantised. All blocks of
the tower share one graph, as do all layers of the decoder: one session, and the weights of each in turn as inputs,
so that memory holds one layer at a time. Taps are outputs at the inputs of every Linear, and at keys and values.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnxscript import GraphBuilder, nn

from ..config import ModelConfig
from ..errors import OneVisionError
from ..export.decoder import Model as DecoderModel
from ..export.graph import IR_VERSION, OPSET
from ..export.layers import Linear, Weight, named_linears
from ..export.patterns import Op, Value
from ..export.vision import VisionTower
from ..precision import FP32
from ..precision.plan import Precision

KEYS, VALUES = "keys", "values"  # taps beside those of the Linears
Arrays = Mapping[str, np.ndarray]
_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


class _Stem(VisionTower):
    """Pixels to what the first block reads."""

    def forward(self, op: Op, *inputs: Value) -> tuple[Value, ...]:  # type: ignore[override]
        return self.embed(op, *inputs)


class _Block(VisionTower):
    """One block of the tower."""

    def forward(self, op: Op, *inputs: Value) -> tuple[Value, ...]:  # type: ignore[override]
        return (self.blocks[0](op, *inputs),)


class _Merger(VisionTower):
    """What the last block gives to image embeddings."""

    def forward(self, op: Op, *inputs: Value) -> tuple[Value, ...]:  # type: ignore[override]
        return (self.merge(op, *inputs),)


class _Layer(DecoderModel):
    """One layer of the decoder over a whole prompt, its cache as long as the prompt."""

    def forward(self, op: Op, *inputs: Value) -> tuple[Value, ...]:  # type: ignore[override]
        x, position_ids, write_indices, valid_length, past_key, past_value = inputs
        step = self.step(op, position_ids, write_indices, valid_length)
        return (self.layers[0](op, x, step, past_key, past_value)[0],)


@dataclass(frozen=True, slots=True)
class Kind:
    """A stage that the model has one or many of. `path`: of the modules in it, with {} for which."""

    name: str
    graph: str
    path: str
    inputs: Callable[[ModelConfig], list[tuple[str, ir.DataType, list[int | str]]]]
    outputs: tuple[str, ...]
    module: Callable[[ModelConfig], nn.Module]

    def label(self, index: int) -> str:
        """What one of them is called."""
        return "visual.merger" if self.name == "merger" else self.path.format(index)

    def place(self, name: str, index: int) -> str:
        """A name of the stage's graph, as it is in the model."""
        first = self.path.format(0)
        return self.path.format(index) + name[len(first) :] if name.startswith(first) else name


def _tower_rows(config: ModelConfig) -> list[tuple[str, ir.DataType, list[int | str]]]:
    c = config.vision
    angles: list[int | str] = ["images", "rows", c.head_dim // 2]
    return [
        ("x", _FLOAT, ["images", "rows", c.hidden_size]),
        ("cos", _FLOAT, angles),
        ("sin", _FLOAT, angles),
    ]


def _pixels(config: ModelConfig) -> list[tuple[str, ir.DataType, list[int | str]]]:
    return [
        ("pixel_values", _FLOAT, ["images", "patches", config.vision.patch_dim]),
        ("patch_positions", _INT64, ["patches", 2]),
    ]


def _prompt(config: ModelConfig) -> list[tuple[str, ir.DataType, list[int | str]]]:
    c = config.text
    cache: list[int | str] = ["batch", c.num_key_value_heads, "max_length", c.head_dim]
    return [
        ("x", _FLOAT, ["batch", "tokens", c.hidden_size]),
        ("position_ids", _INT64, ["batch", "tokens"]),
        ("write_indices", _INT64, ["batch"]),
        ("valid_length", _INT64, [1]),
        ("past_key", _FLOAT, cache),
        ("past_value", _FLOAT, cache),
    ]


def _tower(kind: type[VisionTower]) -> Callable[[ModelConfig], nn.Module]:
    return lambda config: kind(replace(config.vision, depth=1), FP32)


STEM = Kind("stem", "vision", "visual", _pixels, ("x", "cos", "sin"), _tower(_Stem))
BLOCK = Kind("block", "vision", "visual.blocks.{}", _tower_rows, ("y",), _tower(_Block))
MERGER = Kind("merger", "vision", "visual", lambda c: _tower_rows(c)[:1], ("image_embeds",), _tower(_Merger))
LAYER = Kind(
    "layer",
    "decoder",
    "model.layers.{}",
    _prompt,
    ("y",),
    lambda config: _Layer(replace(config.text, num_hidden_layers=1), FP32),
)


class Stage:
    """A stage's session. `taps`: names of its extra outputs, each with the Linears that read that value.

    rounding: precisions of Linears (by their path in the graph) whose inputs are rounded to codes; weights stay
    floats, in which a caller may give what codes are worth.
    """

    def __init__(
        self,
        kind: Kind,
        config: ModelConfig,
        threads: int | None = None,
        rounding: Mapping[str, Precision] | None = None,
    ) -> None:
        self.kind = kind
        module = kind.module(config)
        for path, precision in (rounding or {}).items():
            named_linears(module)[path].quantize(replace(precision, format=None))
        graph, outputs = self._written(module, kind, config)
        weights = {name: value for name, value in graph.initializers.items() if isinstance(value, Weight)}
        self.parameters = {name: weight for name, weight in weights.items() if weight.uses()}
        self.linears = {p: x for p, x in named_linears(module).items() if f"{p}.weight" in self.parameters}
        self.taps: dict[str, list[str]] = {} if rounding else _tap(graph, self.linears)
        for name in weights:
            graph.initializers.pop(name)
        graph.inputs.extend(self.parameters.values())
        self.outputs = (*outputs, *self.taps)
        self._session = _session(graph, threads)
        self._cache_channels = config.text.num_key_value_heads * config.text.head_dim
        self._binding: ort.IOBinding | None = None
        self._held: dict[str, np.ndarray] = {}

    @staticmethod
    def _written(module: nn.Module, kind: Kind, config: ModelConfig) -> tuple[ir.Graph, tuple[str, ...]]:
        builder = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=kind.name))
        inputs = [builder.input(name, dtype, shape) for name, dtype, shape in kind.inputs(config)]
        for name, value in zip(kind.outputs, module(builder.op, *inputs), strict=True):
            builder.add_output(value, name)
        return builder.graph, kind.outputs

    def channels(self, tap: str) -> int:
        """Channels of a tap; of all heads together for keys and values."""
        return self.linears[tap].inputs if tap in self.linears else self._cache_channels

    @property
    def loaded(self) -> bool:
        """Whether weights have been given."""
        return self._binding is not None

    def load(self, weights: Arrays) -> None:
        """Give the weights, by their names in the stage's graph: float32 as the graph stores them."""
        self._binding = self._session.io_binding()
        self._held = {name: np.asarray(weights[name], order="C") for name in self.parameters}
        for name, values in self._held.items():
            if values.dtype != np.float32 or values.shape != self.parameters[name].stored_shape:
                raise ValueError(f"{name}: {values.dtype} {values.shape}")
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values))

    def run(self, inputs: Arrays, taps: bool = True) -> dict[str, np.ndarray]:
        """Outputs by name, those of the taps among them unless told otherwise."""
        assert self._binding is not None
        names = self.outputs if taps else self.kind.outputs
        self._binding.clear_binding_outputs()
        for name, values in inputs.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values)))
        for name in names:
            self._binding.bind_output(name)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions share no useful base
            first = str(error).strip().split("\n")[0]
            raise OneVisionError(f"calibration of {self.kind.path.format(0)}: {first}") from error
        return dict(zip(names, self._binding.copy_outputs_to_cpu(), strict=True))


def _tap(graph: ir.Graph, linears: Mapping[str, Linear]) -> dict[str, list[str]]:
    """Make what Linears read outputs of the graph, named after the first that reads it; and new keys and values."""
    readers: dict[int, list[str]] = {}
    values: dict[int, Value] = {}
    for path, linear in linears.items():
        (product, _), *_ = linear.weight.uses()
        value = product.inputs[0]
        assert value is not None
        values[id(value)] = value
        readers.setdefault(id(value), []).append(path)
    taps = {paths[0]: paths for paths in readers.values()}
    outputs = {paths[0]: values[key] for key, paths in readers.items()}
    written = [node.inputs[1] for node in graph if node.op_type == "TensorScatter"]
    for name, value in zip((KEYS, VALUES), written, strict=False):
        assert value is not None
        outputs[name], taps[name] = value, []
    for name, value in outputs.items():
        identity = ir.node("Identity", [value], outputs=[ir.Value(name=name, type=value.type, shape=value.shape)])
        graph.append(identity)
        graph.outputs.append(identity.outputs[0])
    return taps


def _session(graph: ir.Graph, threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # prompts of all lengths: the arena would keep room for each
    if threads is not None:
        options.intra_op_num_threads = threads
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
