"""Building a bundle's cpu engine: programs and packed weights in engines/cpu/, checked against the plain graphs."""

import json
import os
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from ...bundle import Bundle, BundleWriter, GraphSpec, Phases, no_phases, writing
from ...errors import OneVisionError
from ...precision import FloatFormat, from_float32
from ...runtime.backend import SessionOptions
from ...runtime.cache import Decoder, KVCache
from ...runtime.cpu_graph import CpuGraph
from ...runtime.cpu_library import Pool
from ...runtime.images import patch_positions
from ...runtime.kernels import Level, library
from ...runtime.processor import cpu_name, machine, physical_cores
from ...runtime.stitching import EmbeddingTable
from ..record import RECORD, source_digests
from .compile import COMPILERS, COMPUTE
from .graph import Graph
from .program import Program, WeightsFile
from .record import CpuRecord, PartRecord, folder_of

FLOATS = ("auto", *COMPUTE)
# auto: INT8 products where the embeddings of a picture differ by less from the plain graph's (relative L2 norm).
_VISION_LIMIT = 0.03
_SIDE = 24  # patches on a side of the picture that is checked
_TOKENS = 64
_LEAST_COSINE = 0.9  # below, kernels are wrong rather than coarse


def build_cpu(
    path: str | os.PathLike[str],
    *,
    parts: Sequence[str] | None = None,
    floats: str = "auto",
    check: bool = True,
    overwrite: bool = False,
    phases: Phases = no_phases,
) -> CpuRecord:
    """Build the cpu engine of the bundle at `path`: all of it, or nothing.

    floats: what products run in whose weights the bundle stores as floats: int8 (rounded by column, rows as they
    come), bf16, fp32, or auto: for the decoder bf16, for the tower int8 where that keeps its embeddings within 3 % of
    the plain graph's, else bf16. check: compare with the plain graphs on ONNX Runtime, which must fit the memory; BF16
    graphs, which it has no kernels for, are not compared.
    Raises OneVisionError where a graph is not made of known patterns, there is no compiler, or the disk is full.
    """
    if floats not in FLOATS:
        raise OneVisionError(f"floats is {floats!r}: choose one of {', '.join(FLOATS)}")
    bundle = Bundle.open(path)
    parts = tuple(parts or bundle.manifest.graphs)
    specs = {part: bundle.graph(part) for part in parts}
    with phases("kernels", "steps"):
        kernels, level = library()
    pool = kernels.pool(physical_cores())
    folder = folder_of(bundle)
    with writing(folder, overwrite, marker=RECORD, what="cpu engine") as writer:
        found = {part: _build(bundle, part, specs[part], floats, check, writer, pool, phases) for part in parts}
        record = CpuRecord(_machine(level), found)
        writer.path(RECORD).write_text(json.dumps(record.to_dict(), indent=1) + "\n", encoding="utf-8")
        writer.seal(RECORD)
    return record


def _machine(level: Level) -> dict[str, Any]:
    import onnxruntime

    from ... import __version__

    return {
        "architecture": machine(),
        "cpu": cpu_name(),
        "cores": physical_cores(),
        "kernels": level.name,
        "onnxruntime": onnxruntime.__version__,
        "onevision-edge": __version__,
    }


def _build(
    bundle: Bundle,
    part: str,
    spec: GraphSpec,
    floats: str,
    check: bool,
    writer: BundleWriter,
    pool: Pool,
    phases: Phases,
) -> PartRecord:
    check = check and spec.dtype != "bf16"
    sources = source_digests(bundle, [spec.file, f"{spec.file}.data"])
    tried = (["int8", "bf16"] if part == "vision" and check else ["bf16"]) if floats == "auto" else [floats]
    plain = None
    for compute in tried:
        program = _compile(bundle, part, spec, compute, writer, phases)
        result: dict[str, float] = {}
        if check:
            with phases(f"check {part}", "steps"):
                plain = plain or _Reference(bundle, part)
                result = plain.compare(CpuGraph(writer.directory, part, spec, pool))
        if compute == tried[-1] or result["difference"] <= _VISION_LIMIT or not _rounded(program, spec):
            break
    if result and result["cosine"] < _LEAST_COSINE:
        raise OneVisionError(
            f"{part}: the cpu engine's outputs are not the plain graph's (cosine {result['cosine']:.3f}); nothing was "
            "built"
        )
    files = {}
    for name in (f"{part}.json", f"{part}.weights"):
        writer.seal(name)
        files[name] = writer.files[name]
    return PartRecord(compute, sources, files, program.bytes_per_row, result)


def _rounded(program: Program, spec: GraphSpec) -> bool:
    """Whether products were rounded that the bundle stores as floats."""
    return spec.dtype in spec.weights and any(step.get("weights") == "codes8" for step in program.steps)


def _compile(bundle: Bundle, part: str, spec: GraphSpec, compute: str, writer: BundleWriter, phases: Phases) -> Program:
    total = bundle.manifest.files[f"{spec.file}.data"].size
    with phases(f"pack {part}", "B") as report:
        file = WeightsFile(writer.path(f"{part}.weights"))
        try:
            graph = Graph(bundle.path(spec.file))
            program = COMPILERS[part](graph, compute, file, lambda done, _, what: report(min(done, total), total, what))
            file.close()
        except BaseException:
            file.discard()
            raise
        report(total, total, "")
    writer.path(f"{part}.json").write_text(json.dumps(program.to_dict()) + "\n", encoding="utf-8")
    return program


class _Reference:
    """A plain graph on ONNX Runtime, with what it gives for one seeded input."""

    def __init__(self, bundle: Bundle, part: str) -> None:
        self.bundle, self.part = bundle, part
        merge = bundle.manifest.model.vision.spatial_merge_size
        self.side = _SIDE // merge * merge
        graph = SessionOptions().open(bundle, part)
        self.inputs = self._inputs(graph.fmt)
        self.outputs, self.seconds = self._run(graph)

    def compare(self, graph: CpuGraph) -> dict[str, float]:
        """How far a program is from it, and how long both take (seconds, second run)."""
        outputs, seconds = self._run(graph)
        a, b = outputs.astype(np.float64).ravel(), self.outputs.astype(np.float64).ravel()
        norms = max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30)
        return {
            "difference": float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30)),
            "cosine": float(a @ b / norms),
            "seconds": seconds,
            "plain_seconds": self.seconds,
        }

    def _inputs(self, fmt: FloatFormat) -> np.ndarray:
        random = np.random.default_rng(0)
        if self.part == "decoder":
            text, table = self.bundle.manifest.model.text, self.bundle.manifest.embedding
            if table is not None:
                embeddings = EmbeddingTable(self.bundle.path(table.file), table)
                return embeddings[random.integers(0, text.vocab_size, (1, _TOKENS))]
            return from_float32(0.02 * random.standard_normal((1, _TOKENS, text.hidden_size), np.float32), fmt)
        vision = self.bundle.manifest.model.vision
        merge, side = vision.spatial_merge_size, self.side
        # Colours that change slowly over the picture, as photographs do, and noise.
        y, x = np.mgrid[0 : side * vision.patch_size, 0 : side * vision.patch_size] / (side * vision.patch_size)
        waves = [np.sin(2 * np.pi * (f * x + g * y) + f) for f, g in ((3, 1), (1, 4), (5, 2))]
        picture = np.stack(waves).astype(np.float32) + 0.2 * random.standard_normal((3, *x.shape)).astype(np.float32)
        size = vision.patch_size
        patches = picture.reshape(3, side // merge, merge, size, side // merge, merge, size)
        rows = patches.transpose(1, 4, 2, 5, 0, 3, 6).reshape(1, side * side, -1)
        return from_float32(np.ascontiguousarray(rows[..., : vision.patch_dim]), fmt)

    def _run(self, graph: Any) -> tuple[np.ndarray, float]:
        """Outputs, and the seconds of the second of two runs."""
        manifest = self.bundle.manifest
        if self.part == "vision":
            positions = patch_positions(self.side, self.side, manifest.model.vision.spatial_merge_size)
            inputs = {"pixel_values": self.inputs, "patch_positions": positions}
            graph.run(inputs)
            started = perf_counter()
            return graph.run(inputs)[0], perf_counter() - started
        text = manifest.model.text
        cache = KVCache(text, manifest.max_length, 1, graph.cache_dtype, graph.zeros)
        decoder = Decoder(graph, cache, text.vocab_size)
        tokens = min(_TOKENS, manifest.max_length)
        embeds, rows = self.inputs[:, :tokens], np.arange(tokens)[None]
        decoder(embeds, np.zeros(1, np.int64), rows)
        started = perf_counter()
        return decoder(embeds, np.zeros(1, np.int64), rows).copy(), perf_counter() - started
