"""Checkpoint in, bundle out: two ONNX graphs written layer by layer, weights streamed one tensor at a time."""

import os
import sys
import types
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..bundle import (
    Bundle,
    BundleWriter,
    GraphSpec,
    Manifest,
    Progress,
    TableSpec,
    TensorSpec,
    no_progress,
    writing,
)
from ..errors import OneVisionError
from ..precision import FLOAT_FORMATS, FloatFormat, float_format
from .checkpoint import Checkpoint
from .graph import MEANINGS, Weights, build_decoder, build_vision
from .weights import WeightWriter, source_digest

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


def export(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "fp16",
    max_length: int | None = None,
    parts: Sequence[str] = PARTS,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Bundle:
    """Export a checkpoint to a bundle of ONNX graphs.

    checkpoint: a local directory, a hub id, or "demo". output: the bundle's directory, which appears
    complete or not at all. dtype: fp32, fp16 or bf16. max_length: rows of the KV cache, at
    most the model's max_position_embeddings; None for 4096, or that where it is less. parts: any of
    vision and decoder. progress(done, total, label) is told bytes. Raises OneVisionError.
    """
    fmt = float_format(dtype)
    source = Checkpoint.open(checkpoint)
    limit = source.config.text.max_position_embeddings
    max_length = min(DEFAULT_MAX_LENGTH, limit) if max_length is None else max_length
    _check_options(limit, max_length, parts)
    graphs = {part: _build(source, part, fmt, max_length) for part in PARTS if part in parts}
    _check_weights(source, graphs)
    total = _weight_bytes(source, graphs, fmt)
    with writing(output, overwrite, total) as writer:
        weights = WeightWriter(source, writer, progress, total)
        specs = {}
        for part, (model, parameters) in graphs.items():
            file = f"{part}.onnx"
            specs[part] = _graph_spec(model, file, fmt)
            weights.write_graph(model, parameters.by_name, file)
        table = _write_embedding(weights, fmt) if "decoder" in graphs else None
        _copy_published(source.directory, writer)
        provenance = _provenance(source, weights)
        writer.write_manifest(Manifest(source.config, specs, table, max_length, provenance, writer.files))
    return Bundle.open(output)


def _check_options(limit: int, max_length: int, parts: Sequence[str]) -> None:
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise OneVisionError(f"parts {', '.join(parts) or '(none)'}: choose from {', '.join(PARTS)}")
    if type(max_length) is not int or not 1 <= max_length <= limit:
        raise OneVisionError(f"max_length {max_length} is outside 1..{limit} (the model's max_position_embeddings)")


def _build(source: Checkpoint, part: str, fmt: FloatFormat, max_length: int) -> tuple[ir.Model, Weights]:
    if part == "vision":
        return build_vision(source.config, fmt)
    return build_decoder(source.config, fmt, max_length)


def _check_weights(source: Checkpoint, graphs: dict[str, tuple[ir.Model, Weights]]) -> None:
    """Every tensor is there with the right shape, before the first byte is written."""
    for part, (_, parameters) in graphs.items():
        for name, weight in parameters.by_name.items():
            source.check(source.head_name if name == "lm_head.weight" else name, weight.source_shape)
        if part == "decoder":
            text = source.config.text
            source.check(EMBEDDING_NAME, (text.vocab_size, text.hidden_size))


def _weight_bytes(source: Checkpoint, graphs: dict[str, tuple[ir.Model, Weights]], fmt: FloatFormat) -> int:
    total = sum(w.nbytes for _, parameters in graphs.values() for w in parameters.by_name.values())
    text = source.config.text
    return total + (text.vocab_size * text.hidden_size * fmt.itemsize if "decoder" in graphs else 0)


def _write_embedding(weights: WeightWriter, fmt: FloatFormat) -> TableSpec:
    weights.write_table(EMBEDDING_NAME, fmt, EMBEDDING_FILE)
    text = weights.checkpoint.config.text
    return TableSpec(EMBEDDING_FILE, fmt.onnx, (text.vocab_size, text.hidden_size))


def _graph_spec(model: ir.Model, file: str, fmt: FloatFormat) -> GraphSpec:
    def specs(values: Sequence[Any]) -> tuple[TensorSpec, ...]:
        return tuple(_tensor_spec(value) for value in values)

    return GraphSpec(file, fmt.name, specs(model.graph.inputs), specs(model.graph.outputs))


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
        "checkpoint": source.directory.resolve().name,
        "weights_sha256": source_digest(weights.source_digests),
        "tools": {name: _version(name) for name in ("onevision-edge", "onnx-ir", "onnxscript")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class _CallableModule(types.ModuleType):
    """`onevision_edge.export` names this package and the function in it: calling it calls the function."""

    def __call__(self, *args: Any, **options: Any) -> Bundle:
        return export(*args, **options)


sys.modules[__name__].__class__ = _CallableModule
