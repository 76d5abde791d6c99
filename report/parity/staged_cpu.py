"""The cpu engine looked into: its programs run stage by stage, the stream between two shown to a probe.

A stage ends where the residual stream has been written for the last time: once by the embedding of patches, twice in
every block and layer, after attention and after the MLP.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import GraphSpec
from ...precision import float32
from ...runtime.cpu_engine import CpuEngine
from ...runtime.cpu_graph import CpuGraph
from ...runtime.cpu_library import Call, Step
from ...runtime.cpu_library import Pool as Threads
from .probe import LOGITS, MERGER, PATCH_EMBED, Probe, block_stage, layer_stage


@dataclass
class StagedEngine(CpuEngine):
    """The cpu engine as a backend whose graphs a probe looks into."""

    probe: Probe | None = None

    def graph(self, folder: Path, part: str, spec: GraphSpec) -> CpuGraph:
        """The program in a folder, loaded."""
        return StagedCpuGraph(folder, part, spec, self.pool(), self)


class StagedCpuGraph(CpuGraph):
    """A program that runs in stages."""

    def __init__(self, folder: Path, part: str, spec: GraphSpec, pool: Threads, backend: StagedEngine) -> None:
        super().__init__(folder, part, spec, pool)
        self.backend = backend
        self.stages = tuple(_stages(self.steps, part))
        inputs = {tensor.name: tensor.shape for tensor in spec.inputs}
        widths = [step["k"] for step in self.steps if step["op"] == "prepend"]
        self._input_width = int(inputs["pixel_values" if part == "vision" else "inputs_embeds"][-1])
        self._width = int(widths[0]) if widths else self._input_width

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The tower's image_embeds."""
        (embeds,) = super().run(inputs)
        if self.backend.probe is not None:
            self.backend.probe.after(MERGER, float32(embeds, self.fmt).reshape(-1, embeds.shape[-1]))
        return [embeds]

    def execute(self, call: Call, seconds: Any = None) -> None:
        """Run all stages on a call that was prepared."""
        probe = self.backend.probe
        if probe is None:
            super().execute(call, seconds)
            return
        for stage, start, stop in self.stages:
            rows = self._rows(stage, call)
            rows[:] = probe.before(stage, rows.copy())
            steps = (Step * (stop - start)).from_buffer(self._steps, start * ctypes.sizeof(Step))
            self.pool.run(steps, stop - start, call, None)
            if stage not in (MERGER, LOGITS):
                probe.after(stage, self._stream(call).copy())

    def _rows(self, stage: str, call: Call) -> np.ndarray:
        """What a stage reads, float32 [n, width] where it lies."""
        if stage == PATCH_EMBED:
            return self._floats("input", int(call.counts[0]), self._input_width)
        return self._stream(call)

    def _stream(self, call: Call) -> np.ndarray:
        return self._floats("stream", int(call.counts[0 if self._decoder else 1]), self._width)

    def _floats(self, buffer: str, rows: int, width: int) -> np.ndarray:
        return self._array(buffer)[: 4 * rows * width].view(np.float32).reshape(rows, width)


def _stages(steps: Sequence[Mapping[str, Any]], part: str) -> Iterator[tuple[str, int, int]]:
    """Stages with the ranges of their steps."""
    written = [i + 1 for i, step in enumerate(steps) if step.get("out") == "stream"]
    start = 0
    if part == "vision":
        start = written.pop(0)
        yield PATCH_EMBED, 0, start
    named = block_stage if part == "vision" else layer_stage
    for index, stop in enumerate(written[1::2]):
        yield named(index), start, stop
        start = stop
    yield MERGER if part == "vision" else LOGITS, start, len(steps)
