"""A bundle before its first byte is written, and the writing of it: shared by export and quantisation."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..bundle import BundleWriter, GraphSpec, Manifest, Progress, TableSpec, TensorSpec
from ..errors import OneVisionError
from ..precision import FLOAT_FORMATS, FloatFormat, float_format
from ..precision.plan import Plan
from .checkpoint import Checkpoint
from .graph import MEANINGS, Weights, build_decoder, build_vision
from .weights import NO_VALUES, Values, WeightWriter, source_digest
from .wide import wide_graph, wide_plan

PARTS = ("vision", "decoder")
DEFAULT_MAX_LENGTH = 4096
EMBEDDING_NAME = "model.embed_tokens.weight"
EMBEDDING_FILE = "embed_tokens.bin"

# Copied as published; the runtime reads what it needs of them.
COPIED = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True, slots=True)
class Draft:
    """The graphs of a checkpoint under a plan, their weights still to be written."""

    source: Checkpoint
    plan: Plan
    max_length: int
    graphs: dict[str, tuple[ir.Model, Weights]]

    @classmethod
    def make(
        cls, source: Checkpoint, plan: Plan, max_length: int | None = None, parts: Sequence[str] = PARTS
    ) -> "Draft":
        """Check the options and every tensor of the checkpoint. Raises OneVisionError before anything is written."""
        limit = source.config.text.max_position_embeddings
        max_length = min(DEFAULT_MAX_LENGTH, limit) if max_length is None else max_length
        _check_options(limit, max_length, parts)
        graphs = {part: _build(source, part, plan, max_length) for part in PARTS if part in parts}
        draft = cls(source, plan, max_length, graphs)
        draft._check_weights()
        return draft

    @property
    def fmt(self) -> FloatFormat:
        """What the graphs compute in."""
        return float_format(self.plan.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and of the embedding table."""
        weights = sum(w.nbytes for _, parameters in self.graphs.values() for w in parameters.by_name.values())
        text = self.source.config.text
        return weights + (text.vocab_size * text.hidden_size * self.fmt.itemsize if "decoder" in self.graphs else 0)

    def matrices(self, part: str) -> list[tuple[str, tuple[int, int]]]:
        """Path and shape [in, out] of every Linear of a graph."""
        _, parameters = self.graphs[part]
        found = ((n.rpartition(".")[0], w.stored_shape) for n, w in parameters.by_name.items() if w.transposed)
        return [(path, (shape[0], shape[1])) for path, shape in found]

    def summary(self) -> list[tuple[str, str, int, str]]:
        """What the plan comes to: modules (layers' numbers left out), precision, bytes, the rule's reason."""
        found: dict[tuple[str, str, str], int] = {}
        for part, (_, parameters) in self.graphs.items():
            for name, weight in parameters.by_name.items():
                path = name.rpartition(".")[0]
                linear = weight.transposed
                rule = self.plan.rule(part, path) if linear else None
                precision = self.plan.precision(part, path, weight.stored_shape[0]).name if linear else "float"
                modules = re.sub(r"\.\d+\.", ".*.", path) if linear else "norms, biases, scales"
                key = (modules, precision, rule.reason if rule else "a thousandth of the bytes")
                found[key] = found.get(key, 0) + weight.nbytes
        return [(modules, precision, count, reason) for (modules, precision, reason), count in found.items()]

    def write(self, writer: BundleWriter, progress: Progress, values: Values = NO_VALUES) -> Manifest:
        """Write every file but the manifest, which is returned. values: what is not the checkpoint's as it is."""
        weights = WeightWriter(self.source, writer, progress, self.nbytes, values)
        specs = {}
        for part, (model, parameters) in self.graphs.items():
            file = f"{part}.onnx"
            spec = _graph_spec(model, parameters, file, self.fmt)
            weights.write_graph(model, parameters.by_name, file)
            specs[part] = self._with_wide(part, spec, parameters, writer, values)
        table = self._write_embedding(weights) if "decoder" in self.graphs else None
        _copy_published(self.source.directory, writer)
        provenance = _provenance(self.source, weights)
        return Manifest(self.source.config, specs, table, self.max_length, provenance, files=writer.files)

    def _with_wide(
        self, part: str, spec: GraphSpec, parameters: Weights, writer: BundleWriter, values: Values
    ) -> GraphSpec:
        """Add the graph for engines without FP4, where the plan has FP4."""
        if not any(w.dtype == ir.DataType.FLOAT4E2M1 for w in parameters.by_name.values()):
            return spec
        model, weights = _build(self.source, part, wide_plan(self.plan), self.max_length)
        return replace(
            spec, wide=wide_graph(model, weights, parameters, f"{part}.int8.onnx", f"{spec.file}.data", writer, values)
        )

    def _check_weights(self) -> None:
        """Every tensor is there with the right shape, before the first byte is written."""
        for part, (_, parameters) in self.graphs.items():
            for name, weight in parameters.by_name.items():
                if weight.source_shape is not None:
                    self.source.check(self.source.head_name if name == "lm_head.weight" else name, weight.source_shape)
            if part == "decoder":
                text = self.source.config.text
                self.source.check(EMBEDDING_NAME, (text.vocab_size, text.hidden_size))

    def _write_embedding(self, weights: WeightWriter) -> TableSpec:
        weights.write_table(EMBEDDING_NAME, self.fmt, EMBEDDING_FILE)
        text = self.source.config.text
        return TableSpec(EMBEDDING_FILE, self.fmt.onnx, (text.vocab_size, text.hidden_size))


def _check_options(limit: int, max_length: int, parts: Sequence[str]) -> None:
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise OneVisionError(f"parts {', '.join(parts) or '(none)'}: choose from {', '.join(PARTS)}")
    if type(max_length) is not int or not 1 <= max_length <= limit:
        raise OneVisionError(f"max_length {max_length} is outside 1..{limit} (the model's max_position_embeddings)")


def _build(source: Checkpoint, part: str, plan: Plan, max_length: int) -> tuple[ir.Model, Weights]:
    if part == "vision":
        return build_vision(source.config, plan)
    return build_decoder(source.config, plan, max_length)


def _graph_spec(model: ir.Model, parameters: Weights, file: str, fmt: FloatFormat) -> GraphSpec:
    def specs(values: Sequence[Any]) -> tuple[TensorSpec, ...]:
        return tuple(_tensor_spec(value) for value in values)

    weights: Counter[str] = Counter()
    for weight in parameters.by_name.values():
        codes = weight.computed and weight.transposed  # scales count with the graph's floats
        weights[_STORED.get(weight.dtype, fmt.name) if codes else fmt.name] += weight.nbytes
    return GraphSpec(file, fmt.name, specs(model.graph.inputs), specs(model.graph.outputs), dict(weights))


_STORED: dict[ir.DataType | None, str] = {
    ir.DataType.INT8: "int8",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT4E2M1: "nvfp4",
}


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None
    assert value.shape is not None
    assert value.name is not None
    dtype = next((f.onnx for f in FLOAT_FORMATS.values() if f.onnx_type == value.dtype), value.dtype.name.lower())
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    kind = value.name.split(".")[0]
    return TensorSpec(value.name, dtype, shape, MEANINGS.get(kind, "KV cache, one buffer for past and present"))


def _copy_published(directory: Path, writer: BundleWriter) -> None:
    for name in COPIED:
        source = directory / name
        if source.is_file():
            writer.path(name).write_bytes(source.read_bytes())
            writer.seal(name)


def _provenance(source: Checkpoint, weights: WeightWriter) -> dict[str, Any]:
    return {
        "checkpoint": source.name,
        "weights_sha256": source_digest(weights.source_digests),
        "tools": {name: _version(name) for name in ("onevision-edge", "onnx-ir", "onnxscript")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
