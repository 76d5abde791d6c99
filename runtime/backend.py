"""Running a graph on ONNX Runtime: named tensors in, named tensors out, cache buffers updated in place."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..bundle import Bundle, GraphSpec
from ..config import VisionConfig
from ..errors import OneVisionError
from ..precision import FloatFormat, float_format
from .memory import memory_field, vision_attention_bytes
from .processor import checked_threads
from .stitching import OnHost
from .wide import widened

_ERRORS_ONLY = 3
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
# Attention scores of one call, images * heads * patches^2 values, stay below this (float32: 1 GiB).
_MAX_SCORES = 1 << 28
# It moves the rounding of an INT8 cache's values up to the product that makes them, which then runs in floating point
# on weights widened at each call, and splits attention's products from their transposes: 48 ms a token instead of 18
# (eight INT8 layers of 1,024 on 2 cores).
DISABLED_OPTIMIZERS = ["QDQPropagationTransformer"]


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How ONNX Runtime runs a graph.

    threads: for one operator; None: one per physical core. prepack: let it copy weights into the layout its
    kernels like best. Without, they stay in the mapped file. Measured on a 1.5-billion-parameter FP32 model:
    load 15 s against 0.3 s, 4.3 GB against 0.04 GB of private memory, prefill and decode within noise. Products
    with quantised weights do want it (one row by 4-bit weights: 1.2 ms against 127), so that None is on for
    graphs that have any, and off for the others. exact: keep the activations of weight-only products in floating
    point, as the graph says; ONNX Runtime rounds them to INT8 otherwise, block by block, and is 2 to 100 times
    faster. provider: of PROVIDERS.
    """

    threads: int | None = None
    prepack: bool | None = None
    exact: bool = False
    provider: str = "cpu"
    log_severity: int = _ERRORS_ONLY
    profile_prefix: str | None = None

    def build(self, quantized: bool = False) -> ort.SessionOptions:
        """The same in ONNX Runtime's words, for a graph with quantised weights or without."""
        options = ort.SessionOptions()
        options.log_severity_level = self.log_severity
        if self.threads is not None:
            options.intra_op_num_threads = checked_threads(self.threads)
        if not (quantized if self.prepack is None else self.prepack):
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1" if self.exact else "4")
        if self.profile_prefix:
            options.enable_profiling = True
            options.profile_file_prefix = self.profile_prefix
        return options

    def open(self, bundle: Bundle, part: str) -> "Graph":
        """A graph of a bundle, loaded. Raises OneVisionError."""
        spec = bundle.graph(part)
        if self.provider == "cpu":
            return Graph(bundle.path(spec.file), spec, self)
        from .provider_graph import ProviderGraph

        return ProviderGraph(bundle.path(spec.file), spec, self)


class Graph(OnHost):
    """One graph, loaded. `fmt` is the format of its floating-point inputs. NVFP4 weights run as their twins in INT8."""

    def __init__(self, path: Path, spec: GraphSpec, options: SessionOptions) -> None:
        self.spec = spec
        self.fmt: FloatFormat = float_format(spec.dtype)
        self.log_severity = options.log_severity
        if self.fmt.name == "bf16" and options.provider == "cpu":
            raise OneVisionError(
                f"{path}: ONNX Runtime's CPU provider has no bfloat16 kernels; export with --dtype fp32 or fp16 to run "
                "here (a bf16 bundle is for TensorRT)"
            )
        session_options = options.build(spec.quantized)
        if spec.wide is not None:
            self._wide = {k: v for w in spec.wide.weights for k, v in widened(_data(path), w, self.fmt).items()}
            session_options.add_external_initializers(list(self._wide), list(self._wide.values()))
            path = path.with_name(spec.wide.file)
        try:
            self.session = ort.InferenceSession(
                os.fspath(path),
                session_options,
                providers=self._providers(),
                disabled_optimizers=DISABLED_OPTIMIZERS,
            )
        except Exception as error:  # ONNX Runtime's exceptions share no useful base
            raise OneVisionError(f"{path}: ONNX Runtime cannot load this graph: {first_line(error)}") from error
        self._check_contract(path)

    def _providers(self) -> list[Any]:
        return [PROVIDERS["cpu"]]

    @property
    def cache_dtype(self) -> np.dtype:
        """Of the decoder's KV cache: the graph's float, or int8."""
        return np.dtype(np.int8) if self.spec.int8_cache else self.fmt.numpy

    def images_per_call(self, config: VisionConfig, size: tuple[int, int]) -> int:
        """How many images of a size one call takes, for their attention scores not to fill the memory.

        size: rows and columns of patches. Raises OneVisionError where one image would not fit this machine's memory.
        """
        patches = size[0] * size[1]
        available = memory_field("MemAvailable")
        needed = vision_attention_bytes(config, patches)
        if available is not None and needed > available:
            side = (available / vision_attention_bytes(config, 0)) ** 0.5
            pixels = int(0.9 * side) * config.patch_size**2
            raise OneVisionError(
                f"an image of {patches} patches needs {needed / 1e9:.1f} GB for its attention, and "
                f"{available / 1e9:.1f} GB are free: pass max_pixels={pixels} (--max-pixels {pixels}) or less"
            )
        return max(1, _MAX_SCORES // (config.num_heads * (patches + 1) ** 2))

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Zeroed memory, whose pages are taken from the system when they are written."""
        return np.zeros(shape, dtype)

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run once on host arrays; returns the outputs in the graph's order."""
        try:
            return self.session.run(None, dict(inputs))
        except Exception as error:
            raise OneVisionError(f"{self.spec.file}: {first_line(error)}") from error

    def bind(self) -> "Binding":
        """A binding to run the graph on buffers that stay where they are."""
        return Binding(self)

    def _check_contract(self, path: Path) -> None:
        for what, declared, found in (
            ("inputs", self.spec.inputs, self.session.get_inputs()),
            ("outputs", self.spec.outputs, self.session.get_outputs()),
        ):
            if [_signature(t) for t in declared] != [_signature(t) for t in found]:
                raise OneVisionError(f"{path}: its {what} are not those the manifest names; export it again")


class Binding:
    """A graph with tensors bound to its inputs and outputs. Bound arrays are used where they lie."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._binding = graph.session.io_binding()
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = graph.log_severity
        self._held: dict[str, Any] = {}

    def input(self, name: str, array: np.ndarray) -> None:
        """Bind a contiguous array to an input."""
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self._held[name] = (value, array)
        self._binding.bind_ortvalue_input(name, value)

    def in_place(self, past: str, present: str, array: np.ndarray) -> None:
        """Bind one contiguous array to an input and to the output that updates it."""
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self._held[past] = (value, array)
        self._binding.bind_ortvalue_input(past, value)
        self._binding.bind_ortvalue_output(present, value)

    def output(self, name: str, array: np.ndarray) -> None:
        """Bind a contiguous array to receive an output."""
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self._held[name] = (value, array)
        self._binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        """Run on what is bound."""
        try:
            self.graph.session.run_with_iobinding(self._binding, self._run_options)
        except Exception as error:
            raise OneVisionError(f"{self.graph.spec.file}: {first_line(error)}") from error


def _data(path: Path) -> Path:
    """The data file beside a graph."""
    return path.with_name(path.name + ".data")


def _signature(tensor: Any) -> tuple[str, list[int | None]]:
    """Name and fixed dimensions of a declared or loaded tensor."""
    return tensor.name, [size if isinstance(size, int) else None for size in tensor.shape]


def first_line(error: BaseException) -> str:
    """What ONNX Runtime says, without what follows it."""
    return str(error).strip().split("\n")[0]
