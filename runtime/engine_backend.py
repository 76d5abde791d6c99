"""A bundle's TensorRT engines as a backend: found, checked before they are loaded, deserialised."""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..engines.dialects import DIALECTS, first_line, logger
from ..engines.record import ENGINES, EngineSet, check_engine, engine_folders, read_set
from ..errors import OneVisionError
from .cuda import CudaDriver
from .device import Driver
from .engine_graph import EngineGraph

LOG = logging.getLogger(__name__)
_LEVELS = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING}


@dataclass
class Engines:
    """The engines in `engines/<target>` of a bundle, on one GPU.

    target: None for the only one there, or the one that was built for this GPU. verify: hash engines before they are
    loaded. cuda_graphs: replay decode steps as CUDA graphs.
    """

    target: str | None = None
    verify: bool = False
    cuda_graphs: bool = True
    _kept: list[Any] = field(default_factory=list, repr=False)  # what must outlive the engines

    def open(self, bundle: Bundle, part: str) -> EngineGraph:
        """A graph's engine, ready to run. Raises OneVisionError where it cannot run here, with what to do."""
        folder = self.folder(bundle)
        kind = read_set(folder).engine
        library = self.library(kind)
        path, found = check_engine(
            bundle,
            folder,
            part,
            engine=kind,
            version=library.__version__,
            capability=self.capability,
            verify=self.verify,
        )
        engine = self.deserialize(bundle, part, path, found)
        captured = self.cuda_graphs and kind == "tensorrt"  # TensorRT-RTX captures by itself
        context = self.context(engine, kind)
        return EngineGraph(engine, bundle.graph(part), self.driver, str(path), context, captured)

    @cached_property
    def driver(self) -> Driver:
        """What owns the GPU's memory."""
        return CudaDriver()

    @property
    def capability(self) -> str | None:
        """The GPU's compute capability."""
        return getattr(self.driver, "capability", None)

    def folder(self, bundle: Bundle) -> Path:
        """Where the target's engines are. Raises OneVisionError where there are none, or several to choose from."""
        folders = engine_folders(bundle)
        names = [folder.name for folder in folders]
        if not folders:
            raise OneVisionError(f"{bundle.directory} has no engines yet: make them with onevision-edge build")
        if self.target is not None:
            if self.target not in names:
                raise OneVisionError(f"{bundle.directory} has no engines for {self.target}, only {', '.join(names)}")
            return bundle.directory / ENGINES / self.target
        fitting = [f for f in folders if self.capability is None or self.capability in read_set(f).capabilities]
        if len(fitting) == 1 or len(folders) == 1:
            return (fitting or folders)[0]
        raise OneVisionError(f"{bundle.directory} has engines for {', '.join(names)}: choose one of these")

    def library(self, kind: str) -> Any:
        """The module of TensorRT or TensorRT-RTX. Raises OneVisionError where it is not installed."""
        return DIALECTS[kind].load()

    def deserialize(self, bundle: Bundle, part: str, path: Path, found: EngineSet) -> Any:
        """The engine in a file. Raises OneVisionError where TensorRT refuses it."""
        library = self.library(found.engine)
        log = logger(library, _log)
        runtime = library.Runtime(log)
        with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise OneVisionError(
                f"{path}: {found.engine} {library.__version__} cannot load it: {first_line(log.errors)}"
            )
        self._kept += [log, runtime]
        return engine

    def context(self, engine: Any, kind: str) -> Any:
        """An execution context. TensorRT-RTX captures CUDA graphs by itself."""
        if kind != "tensorrt-rtx":
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        strategy = self.library(kind).CudaGraphStrategy
        config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if self.cuda_graphs else strategy.DISABLED
        return engine.create_execution_context(config)


def _log(severity: str, message: str) -> None:
    """TensorRT's messages as Python's logging has them."""
    LOG.log(_LEVELS.get(severity, logging.DEBUG), "%s", message)
