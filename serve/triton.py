"""A bundle as a model repository of NVIDIA Triton.

    onevision/            questions in, answers out: Python, with our runtime, calling the two below
        config.pbtxt
        1/model.py, 1/bundle/
    onevision_vision/     the vision graph, on ONNX Runtime or as a TensorRT plan
        config.pbtxt
        1/vision.onnx, 1/vision.onnx.data
    onevision_decoder/    the decoder graph on ONNX Runtime; not there where the runtime opens it itself

Files of the bundle are linked where the disk allows it, so that a repository takes no room of its own.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..bundle import MANIFEST, Bundle, BundleWriter, GraphSpec, TensorSpec, writing
from ..engines.cpu.record import has_engine
from ..engines.record import CPU, ENGINES, EngineSet, read_set
from ..errors import OneVisionError
from ..runtime.prompts import optional_tokenizer
from .triton_config import ModelConfig, TensorConfig, free_dims

DEFAULT_NAME = "onevision"
_MODEL = """\
\"\"\"What Triton's Python backend loads; the code is the package's, which its environment has to have.\"\"\"

from pathlib import Path

from onevision_edge.serve.triton_model import TritonAnswers


class TritonPythonModel(TritonAnswers):
    folder = Path(__file__).parent
"""
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int8": "TYPE_INT8",
    "int64": "TYPE_INT64",
}
_INPUTS = (
    TensorConfig("messages", "TYPE_STRING", (1,), optional=True),
    TensorConfig("prompt", "TYPE_STRING", (1,), optional=True),
    TensorConfig("images", "TYPE_STRING", (-1,), optional=True),
    TensorConfig("options", "TYPE_STRING", (1,), optional=True),
    TensorConfig("stream", "TYPE_BOOL", (1,), optional=True),
)
_OUTPUTS = tuple(TensorConfig(name, "TYPE_STRING", (1,)) for name in ("text", "finish_reason", "usage"))


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """How a repository is to run.

    decoder: "triton", as a model of its own, whose calls carry the KV cache there and back; "runtime", in the process
    of the Python model, where the cache stays and is updated in place (the shipped model, 8.4 MB of cache for a
    sequence, on one thread: 5.7 ms a token and 0.6). engines: a target with TensorRT engines, whose
    vision engine becomes a plan and whose decoder the runtime opens, as Triton cannot update a cache in place. device:
    of the graphs on ONNX Runtime. slots: sequences at a time. threads: of an operator; None: all cores.
    """

    name: str = DEFAULT_NAME
    decoder: Literal["triton", "runtime"] = "triton"
    engines: str | None = None
    device: Literal["cpu", "gpu"] = "cpu"
    slots: int = 8
    threads: int | None = None

    def __post_init__(self) -> None:
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise OneVisionError(f"{self.name!r} is not a model's name: use letters, digits, - and _")
        if self.engines is not None and self.decoder == "triton":
            raise OneVisionError(
                "Triton cannot update a KV cache in place, which the decoder's engines need: with engines, choose "
                "--decoder runtime"
            )


def export_triton(
    bundle: Bundle, repository: str | os.PathLike[str], options: TritonOptions, overwrite: bool = False
) -> list[str]:
    """Write a model repository, all of it or nothing; returns its models' names. Raises OneVisionError."""
    _check(bundle, options)
    configs = _configs(bundle, options)
    with writing(repository, overwrite, marker=f"{options.name}/config.pbtxt", what="model repository") as writer:
        for config in configs:
            folder = writer.path(config.name)
            (folder / "1").mkdir(parents=True)
            (folder / "config.pbtxt").write_text(config.text(), encoding="utf-8")
        _write_answers(writer.path(options.name) / "1", bundle, options)
        for part in ("vision", "decoder"):
            folder = writer.path(f"{options.name}_{part}") / "1"
            if folder.is_dir():
                _write_graph(folder, bundle, part, options)
        _flush(writer)
    return [config.name for config in configs]


def cache_bytes(bundle: Bundle) -> int:
    """Bytes of one sequence's KV cache, which a decoder call carries each way."""
    spec, count = bundle.graph("decoder"), 0
    for tensor in spec.inputs:
        if tensor.name.startswith("past_"):
            sizes = [size for size in tensor.shape if isinstance(size, int)]
            product = {"float32": 4, "float16": 2}.get(tensor.dtype, 1)
            for size in sizes:
                product *= size
            count += product
    return count


def _check(bundle: Bundle, options: TritonOptions) -> None:
    """Refuse what cannot be served."""
    if optional_tokenizer(bundle.directory) is None:
        raise OneVisionError(f"{bundle.directory} has no tokenizer.json, which answers need")
    for part in ("vision", "decoder"):
        spec = bundle.graph(part)
        if spec.dtype == "bf16":
            raise OneVisionError(
                f"{bundle.directory} is bf16, which Triton's Python tensors do not have: export with --dtype fp16"
            )
        if spec.wide is not None and (part == "vision" or options.decoder == "triton"):
            raise OneVisionError(
                f"{spec.file} has NVFP4 weights, which Triton's ONNX Runtime cannot load: quantise to another "
                "precision, or serve the decoder with --decoder runtime"
            )
    if options.engines is not None:
        _plans(bundle, options.engines)


def _plans(bundle: Bundle, target: str) -> EngineSet:
    """The engines of a target. Raises OneVisionError where Triton has no backend for them."""
    found = read_set(bundle.directory / ENGINES / target)
    if found.engine != "tensorrt":
        raise OneVisionError(
            f"the engines for {target} are of {found.engine}, for which Triton has no backend: build them with "
            "TensorRT, or leave --engines out"
        )
    missing = [part for part in ("vision", "decoder") if part not in found.engines]
    if missing:
        raise OneVisionError(f"there is no {missing[0]} engine for {target}: build it with onevision-edge build")
    return found


def _configs(bundle: Bundle, options: TritonOptions) -> list[ModelConfig]:
    """The configurations: of the answers first, then of the graphs that are models."""
    found = [_answers_config(options), _graph_config(bundle.graph("vision"), "vision", options)]
    if options.decoder == "triton":
        found.append(_graph_config(bundle.graph("decoder"), "decoder", options))
    return found


def _answers_config(options: TritonOptions) -> ModelConfig:
    parameters = {
        "vision": f"{options.name}_vision",
        "decoder": f"{options.name}_decoder" if options.decoder == "triton" else "",
        "engines": options.engines or "",
        "slots": str(options.slots),
        "threads": str(options.threads or ""),
    }
    return ModelConfig(options.name, _INPUTS, _OUTPUTS, backend="python", decoupled=True, parameters=parameters)


def _graph_config(spec: GraphSpec, part: str, options: TritonOptions) -> ModelConfig:
    plan = options.engines is not None
    parameters = {"intra_op_thread_count": str(options.threads)} if options.threads and not plan else {}
    return ModelConfig(
        f"{options.name}_{part}",
        tuple(_tensor(t) for t in spec.inputs),
        tuple(_tensor(t) for t in spec.outputs),
        platform="tensorrt_plan" if plan else "onnxruntime_onnx",
        file="model.plan" if plan else spec.file,
        gpu=plan or options.device == "gpu",
        parameters=parameters,
    )


def _tensor(tensor: TensorSpec) -> TensorConfig:
    return TensorConfig(tensor.name, _TYPES[tensor.dtype], free_dims(tensor.shape))


def _write_answers(folder: Path, bundle: Bundle, options: TritonOptions) -> None:
    """The Python model and the bundle that it reads."""
    (folder / "model.py").write_text(_MODEL, encoding="utf-8")
    for name in (*bundle.manifest.files, MANIFEST):
        _place(bundle.path(name), folder / "bundle" / name)
    engines = options.engines or (CPU if options.decoder == "runtime" and has_engine(bundle) else None)
    if engines is not None:
        source = bundle.directory / ENGINES / engines
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            _place(path, folder / "bundle" / ENGINES / engines / path.relative_to(source))


def _write_graph(folder: Path, bundle: Bundle, part: str, options: TritonOptions) -> None:
    """The files of one graph, or its plan."""
    if options.engines is not None:
        plan = _plans(bundle, options.engines).engines[part].file
        _place(bundle.directory / ENGINES / options.engines / plan, folder / "model.plan")
        return
    spec = bundle.graph(part)
    for name in (spec.file, f"{spec.file}.data"):
        if name in bundle.manifest.files:
            _place(bundle.path(name), folder / name)


def _place(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the disk is another one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _flush(writer: BundleWriter) -> None:
    for path in writer.directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
