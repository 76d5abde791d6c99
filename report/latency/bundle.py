"""A bundle as a subject: loaded, asked for the tokens of a cell, looked into where its time goes."""

from collections.abc import Callable
from time import monotonic
from typing import Any

import numpy as np

from ...errors import OneVisionError
from ...runtime.cpu_graph import CpuGraph
from ...runtime.engine_graph import EngineGraph
from ...runtime.generation import Timings
from ...runtime.images import ImageProcessor
from ...runtime.model import Model, load
from ..subject import CPU_ENGINE, ONNXRUNTIME, TENSORRT, bundle_subject
from .cells import Cell, seeded_ids, seeded_images
from .device import GpuGauge
from .metrics import DECODE, EMBEDDINGS, PREFILL, PREPROCESS, VISION, Request
from .profile import profile

Clock = Callable[[], float]


class BundleRunner:
    """A bundle, loaded, without memory of earlier requests and without drafts: what is timed is the work."""

    def __init__(self, path: str, name: str, threads: int | None = None, engines: str | bool | None = None) -> None:
        self.name, self._threads = name, threads
        self.model = load(path, threads=threads, engines=engines, image_cache=0, prefix_caches=0)
        if "decoder" not in self.model.graphs:
            raise OneVisionError(f"{path} has no decoder, so that no token can be timed: export it with both parts")
        self._gauge = GpuGauge() if self.backend == TENSORRT else None

    @property
    def backend(self) -> str:
        """What runs the decoder."""
        return backend_of(self.model)

    def subject(self, cells: list[Cell]) -> dict[str, Any]:
        """What was loaded, as the record has it."""
        found = bundle_subject(self.model.bundle, self.backend, name=self.name).to_dict()
        return {**found, "notes": list(dict.fromkeys(note for cell in cells for note in self._notes(cell)))}

    def request(self, cell: Cell, seed: int, clock: Clock = monotonic) -> Request:
        """Run a cell once on the inputs of a seed. Raises OneVisionError where it does not fit."""
        images, ids = seeded_images(cell, seed), self._ids(cell, seed)
        timings, started = Timings(), clock()
        pixels, grids = self.model.processor(images) if images else (None, None)
        timings.preprocess = clock() - started
        tokens: list[list[float]] = [[] for _ in range(cell.batch)]
        steps = self.model.stream_ids(
            ids, pixels, grids, timings=timings, max_tokens=cell.output_tokens, ignore_eos=True, speculate=0
        )
        for new in steps:
            now = clock() - started
            for row in new:
                tokens[row].append(now)
        if self._gauge is not None:
            self._gauge.read()
        return Request(started, _stages(timings, cell), tokens, ids.shape[1])

    def device(self) -> dict[str, float] | None:
        """Of the GPU that engines run on, so far."""
        return self._gauge.result() if self._gauge is not None else None

    def profile(self, cell: Cell, seed: int) -> dict[str, Any]:
        """Where the time of one request of a cell goes; see profile.profile."""
        return profile(self.model, self.backend, self._threads, lambda model: self._with(model).request(cell, seed))

    def _with(self, model: Model) -> "BundleRunner":
        runner = object.__new__(BundleRunner)
        runner.name, runner._threads, runner.model, runner._gauge = self.name, self._threads, model, None
        return runner

    def _ids(self, cell: Cell, seed: int) -> np.ndarray:
        """Placeholders of the image, then text: int64 [batch, tokens]."""
        config = self.model.config
        placeholders = image_tokens(self.model.processor, cell)
        total, most = placeholders + cell.prompt_tokens + cell.output_tokens - 1, self.model.max_length
        if total > most:
            raise OneVisionError(
                f"{cell.name}: {total} tokens, and {self.name} holds {most}: use fewer or a smaller image"
            )
        special = {config.image_token_id, config.video_token_id}
        text = seeded_ids(cell, cell.prompt_tokens, config.text.vocab_size, seed, special)
        return np.hstack([np.full((cell.batch, placeholders), config.image_token_id), text])

    def _notes(self, cell: Cell) -> list[str]:
        if cell.size is None:
            return []
        height, width = self.model.processor.resized(cell.size[1], cell.size[0])
        return [] if (width, height) == cell.size else [f"images of {cell.image} are resized to {width}x{height}"]


def image_tokens(processor: ImageProcessor, cell: Cell) -> int:
    """Of the image of one sequence."""
    if cell.size is None:
        return 0
    height, width = processor.resized(cell.size[1], cell.size[0])
    return height * width // processor.factor**2


def backend_of(model: Model) -> str:
    """What runs a model's decoder, or its only graph."""
    graph = model.graphs.get("decoder") or next(iter(model.graphs.values()))
    if isinstance(graph, CpuGraph):
        return CPU_ENGINE
    return TENSORRT if isinstance(graph, EngineGraph) else ONNXRUNTIME


def _stages(timings: Timings, cell: Cell) -> dict[str, float]:
    """Seconds by stage; those of images only where there are some."""
    found = {EMBEDDINGS: timings.prepare_embeddings, PREFILL: timings.prefill, DECODE: timings.decode}
    if not cell.images:
        return found
    return {PREPROCESS: timings.preprocess, VISION: timings.vision_encoding, **found}
