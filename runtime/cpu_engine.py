"""A bundle's cpu engine as a backend."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..bundle import Bundle, GraphSpec
from ..engines.cpu.record import CpuRecord, check_part, folder_of, read_record
from ..errors import OneVisionError
from .backend import Graph
from .cpu_graph import CpuGraph
from .cpu_library import Pool
from .kernels import Level, library
from .processor import checked_threads, physical_cores

LOG = logging.getLogger(__name__)


@dataclass
class CpuEngine:
    """The programs in engines/cpu of a bundle, on the kernels for this CPU.

    threads: None for one per physical core. They sleep between calls.
    """

    threads: int | None = None
    level: Level | None = None  # of the kernels that are in use
    _pool: Pool | None = field(default=None, repr=False)
    _record: CpuRecord | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.threads is not None:
            checked_threads(self.threads)

    def open(self, bundle: Bundle, part: str) -> CpuGraph:
        """A graph's program, loaded. Raises OneVisionError where there is none, or it cannot run here."""
        spec = bundle.graph(part)
        if self._record is None:
            self._record = read_record(bundle)
        if self._record is None:
            raise OneVisionError(
                f"{bundle.directory} has no cpu engine: make it with "
                f"onevision-edge build {bundle.directory} --target cpu"
            )
        check_part(bundle, self._record, part)
        return self.graph(folder_of(bundle), part, spec)

    def graph(self, folder: Path, part: str, spec: GraphSpec) -> CpuGraph:
        """The program in a folder, loaded."""
        return CpuGraph(folder, part, spec, self.pool())

    def pool(self) -> Pool:
        """The threads that all graphs of a bundle share."""
        if self._pool is None:
            kernels, self.level = library()
            self._pool = kernels.pool(self.threads or physical_cores())
        return self._pool


class Plain(Protocol):
    """What opens the plain graphs of a bundle."""

    def open(self, bundle: Bundle, part: str) -> Graph:
        """A graph, loaded. Raises OneVisionError."""


@dataclass
class CpuOrPlain:
    """The cpu engine where it runs, else the plain graph on ONNX Runtime, with a warning that says why."""

    engine: CpuEngine
    plain: Plain

    def open(self, bundle: Bundle, part: str) -> CpuGraph | Graph:
        """A graph, loaded. Raises OneVisionError."""
        try:
            return self.engine.open(bundle, part)
        except OneVisionError as error:
            LOG.warning("ONNX Runtime runs the plain %s graph: %s", part, error)
            return self.plain.open(bundle, part)
