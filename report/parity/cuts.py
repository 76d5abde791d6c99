"""A bundle's graph cut into its stages, each a model of its own whose weights stay in the bundle's data file.

Nodes carry their module's path and lie in the model's order, so a stage is a range of them: what comes before the
first layer, every layer, what comes after the last. What a stage reads of those before it becomes its inputs.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from ...errors import OneVisionError
from .probe import LOGITS, MERGER, PATCH_EMBED, block_stage, layer_stage

PRELUDE = "prelude"  # of the decoder: angles and mask, which all of its layers share
_LAYER = {"vision": re.compile(r"visual/blocks\.(\d+)/"), "decoder": re.compile(r"model/layers\.(\d+)/")}
_STAGE = {"vision": block_stage, "decoder": layer_stage}
_ENDS = {"vision": (PATCH_EMBED, MERGER), "decoder": (PRELUDE, LOGITS)}
_NOT_ROUNDED = re.compile(r"(visual|model)/[^/]+")  # angles and masks, which BF16 models keep in FP32
_ROUNDED = {
    *("MatMul", "Add", "Mul", "Sigmoid", "Softmax", "Gelu", "Attention"),
    *("LayerNormalization", "RMSNormalization", "RotaryEmbedding"),
}


@dataclass(frozen=True, slots=True)
class Cut:
    """One stage. stream: the value that it reads of the stage before, None for the first; inputs: with the stream.

    outputs: what later stages or the graph's caller read.
    """

    stage: str
    nodes: tuple[onnx.NodeProto, ...]
    stream: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class CutGraph:
    """A graph file, cut. `part`: vision or decoder. Raises OneVisionError where it is not as `export` writes it."""

    def __init__(self, path: Path, part: str) -> None:
        self.path, self.part = path, part
        self.model = _read(path)
        graph = self.model.graph
        self.types = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.cuts = tuple(self._cuts())

    def stage_model(self, cut: Cut, *, rounded: bool = False, taps: Sequence[str] = ()) -> onnx.ModelProto:
        """The model of one stage; taps: values inside it that are outputs, too; rounded: every value in BF16."""
        nodes = list(_rounded(cut.nodes, self.types)) if rounded else list(cut.nodes)
        read = {name for node in nodes for name in node.input}
        graph = onnx.GraphProto(name=cut.stage)
        graph.node.extend(nodes)
        graph.initializer.extend(tensor for name, tensor in self.initializers.items() if name in read)
        graph.input.extend(self.types[name] for name in cut.inputs)
        graph.output.extend(self.types[name] for name in (*cut.outputs, *taps))
        made = onnx.ModelProto(ir_version=self.model.ir_version, graph=graph)
        made.opset_import.extend(self.model.opset_import)
        return made

    def modules(self, cut: Cut) -> dict[str, str]:
        """The last value of every module of a stage, by the module's path within it, in the order they are made."""
        found: dict[str, str] = {}
        for node in cut.nodes:
            path, _, operation = node.name.rpartition("/")
            name = _within(path) + (".rotary" if operation.startswith("RotaryEmbedding") else "")
            if name and node.output[0] in self.types and _floats(self.types[node.output[0]]):
                found.pop(name, None)
                found[name] = node.output[0]
        return found

    def _cuts(self) -> Iterator[Cut]:
        nodes, graph_outputs = list(self.model.graph.node), {value.name for value in self.model.graph.output}
        ranges = self._ranges([node.name for node in nodes])
        previous: list[str] = []
        for stage, start, stop in ranges:
            own = nodes[start:stop]
            made = [name for node in own for name in node.output]
            later = _read_by(nodes[stop:]) | graph_outputs
            inputs = sorted(_read_by(own) - set(made) - self.initializers.keys())
            outputs = [name for name in made if name in later]
            yield Cut(stage, tuple(own), self._stream(own, previous, stage), tuple(inputs), tuple(outputs))
            previous = ["inputs_embeds"] if stage == PRELUDE else outputs

    def _ranges(self, names: Sequence[str]) -> list[tuple[str, int, int]]:
        """Stages with the ranges of their nodes."""
        layers = [_number(name, _LAYER[self.part]) for name in names]
        inside = [i for i, layer in enumerate(layers) if layer is not None]
        found = [layers[i] for i in range(inside[0], inside[-1] + 1)] if inside else []
        if not found or None in found or found != sorted(found, key=lambda layer: layer or 0):
            raise OneVisionError(f"{self.path}: its nodes are not named and ordered as export writes them")
        starts = {layer: inside[0] + found.index(layer) for layer in dict.fromkeys(found)}
        first, last = _ENDS[self.part]
        edges = [*starts.values(), inside[-1] + 1, len(names)]
        stages = [_STAGE[self.part](int(layer or 0)) for layer in starts]
        return [(first, 0, edges[0]), *zip([*stages, last], edges, edges[1:], strict=False)]

    def _stream(self, own: Sequence[onnx.NodeProto], previous: Sequence[str], stage: str) -> str | None:
        """What the first node that reads the stage before reads of it."""
        found = next((name for node in own for name in node.input[:1] if name in previous), None)
        if found is None and previous:
            raise OneVisionError(f"{self.path}: {stage} does not read the stage before it")
        return found


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise OneVisionError(f"{path}: cannot be read as ONNX: {error}") from error
    except Exception as error:  # protobuf's DecodeError, whose module is not public
        raise OneVisionError(f"{path} is not an ONNX file: {error}") from error


def _read_by(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.input if name}


def _number(name: str, pattern: re.Pattern[str]) -> int | None:
    found = pattern.match(name)
    return int(found[1]) if found else None


def _within(path: str) -> str:
    """A module's path within its stage: self_attn.q_proj of model/layers.1/self_attn/q_proj; empty for the stage."""
    for pattern in _LAYER.values():
        found = pattern.match(path + "/")
        if found:
            return path[found.end() :].replace("/", ".")
    return path.replace("/", ".")


def _floats(value: onnx.ValueInfoProto) -> bool:
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return value.type.tensor_type.elem_type in kinds


def _rounded(nodes: Sequence[onnx.NodeProto], types: dict[str, onnx.ValueInfoProto]) -> Iterator[onnx.NodeProto]:
    """The nodes with every value that a BF16 model would keep rounded to BF16, in the type that it has.

    Scores of attention stay as they are: fused kernels hold them in FP32.
    """
    scores = {name for node in nodes if node.op_type in ("Softmax", "Where") for name in node.input}
    for node in nodes:
        output = node.output[0]
        floats = output in types and _floats(types[output])
        if node.op_type not in _ROUNDED or not floats or output in scores or _NOT_ROUNDED.fullmatch(node.name):
            yield node
            continue
        exact = onnx.NodeProto()
        exact.CopyFrom(node)
        exact.output[0] = f"{output}.exact"
        yield exact
        kind = types[output].type.tensor_type.elem_type
        bf16 = onnx.TensorProto.BFLOAT16
        yield onnx.helper.make_node("Cast", [f"{output}.exact"], [f"{output}.bf16"], f"{node.name}.bf16", to=bf16)
        yield onnx.helper.make_node("Cast", [f"{output}.bf16"], [output], f"{node.name}.rounded", to=kind)
