"""Times of single operations, from what runs a model: ONNX Runtime, the cpu engine or TensorRT."""

import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time_ns
from typing import Any

from ...bundle import Bundle
from ...errors import OneVisionError
from ...runtime.backend import Graph, SessionOptions
from ...runtime.cpu_graph import CpuGraph
from ...runtime.engine_graph import EngineGraph
from ...runtime.model import Model
from ..subject import CPU_ENGINE, TENSORRT
from .profile_names import ROOTS, node_module, node_modules, node_operation, step_modules

Run = Callable[[Model], Any]
_KERNEL = "_kernel_time"


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of an operation in a module, in so many calls."""

    module: str
    operation: str
    seconds: float
    calls: int = 1


def timed_operations(model: Model, backend: str, threads: int | None, run: Run) -> list[Timed]:
    """Times of what `run` does with a model; it is run twice, and the first is not counted. Raises OneVisionError."""
    if backend == CPU_ENGINE:
        return _cpu_engine(model, run)
    return _tensorrt(model, run) if backend == TENSORRT else _onnxruntime(model.bundle, threads, run)


def _cpu_engine(model: Model, run: Run) -> list[Timed]:
    """By the kernels' own clock around each step."""
    graphs = {part: graph for part, graph in model.graphs.items() if isinstance(graph, CpuGraph)}
    run(model)
    times = {part: graph.timed() for part, graph in graphs.items()}
    run(model)
    found = []
    for part, graph in graphs.items():
        modules = step_modules(graph.steps, part)
        for step, module, seconds in zip(graph.steps, modules, times[part].seconds, strict=True):
            found.append(Timed(module, _operation(step), float(seconds), times[part].calls))
    return found


def _operation(step: Mapping[str, Any]) -> str:
    """A step's kind, and for a product what it multiplies."""
    weights = f" ({step['kind']} x {step['weights']})" if step["op"] == "product" else ""
    return f"{step['op']}{weights}"


@dataclass
class _Profiled:
    """ONNX Runtime with its profiler on, a file for each graph."""

    options: SessionOptions
    folder: Path
    opened: dict[str, Graph] = field(default_factory=dict)

    def open(self, bundle: Bundle, part: str) -> Graph:
        """A graph, loaded."""
        options = replace(self.options, profile_prefix=str(self.folder / part))
        self.opened[part] = options.open(bundle, part)
        return self.opened[part]


def _onnxruntime(bundle: Bundle, threads: int | None, run: Run) -> list[Timed]:
    with TemporaryDirectory() as folder:
        backend = _Profiled(SessionOptions(threads=threads), Path(folder))
        model = Model(bundle, backend, image_cache=0, prefix_caches=0)
        run(model)
        began = time_ns()
        run(model)
        return [one for part, graph in backend.opened.items() for one in _events(graph, part, began)]


def _events(graph: Graph, part: str, began: int) -> list[Timed]:
    """What the profiler wrote of nodes since a time of the system's clock, in nanoseconds."""
    since = (began - graph.session.get_profiling_start_time_ns()) / 1000
    events = json.loads(Path(graph.session.end_profiling()).read_text())
    return node_times([event for event in events if event.get("ts", 0) >= since], ROOTS[part])


def node_times(events: list[dict[str, Any]], root: str) -> list[Timed]:
    """Times of the nodes among the events of ONNX Runtime's profiler, in microseconds there."""
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_KERNEL)]
    nodes.sort(key=lambda event: event["ts"])
    names = [event["name"].removesuffix(_KERNEL) for event in nodes]
    modules = node_modules(names, root)
    return [Timed(m, str(e["args"]["op_name"]), e["dur"] / 1e6) for m, e in zip(modules, nodes, strict=True)]


def _tensorrt(model: Model, run: Run) -> list[Timed]:
    """By TensorRT's IProfiler, with a call's layers one after the other: no CUDA graphs meanwhile."""
    graphs = {part: graph for part, graph in model.graphs.items() if isinstance(graph, EngineGraph)}
    with _without_cuda_graphs(graphs):
        run(model)
        layers = {part: layer_profiler(graph.context) for part, graph in graphs.items()}
        run(model)
    return [layer_time(name, seconds, ROOTS[part]) for part, found in layers.items() for name, seconds in found.times]


@contextmanager
def _without_cuda_graphs(graphs: Mapping[str, EngineGraph]) -> Any:
    kept = {part: graph.cuda_graphs for part, graph in graphs.items()}
    for graph in graphs.values():
        graph.cuda_graphs = False
    try:
        yield
    finally:
        for part, graph in graphs.items():
            graph.cuda_graphs = kept[part]


def layer_profiler(context: Any) -> Any:
    """An IProfiler of the context's library, on it: `times`, names and seconds of layers. Raises OneVisionError."""
    library: Any = import_module(type(context).__module__)
    if not hasattr(library, "IProfiler"):
        raise OneVisionError("these engines give no access to the times of their layers: leave out --profile")

    class Layers(library.IProfiler):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.append((layer_name, ms / 1000))

    context.profiler = layers = Layers()
    return layers


def layer_time(name: str, seconds: float, root: str) -> Timed:
    """A layer's time, under the first node that its name tells; TensorRT merges many into one."""
    return Timed(node_module(name) or root, node_operation(name) or "merged", seconds)
