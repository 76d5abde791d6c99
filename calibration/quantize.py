"""Checkpoint in, quantised bundle out: calibrated on images, its distance from full precision measured."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from .. import __version__
from ..bundle import Bundle, BundleWriter, Manifest, Phases, Progress, check_destination, no_phases, writing
from ..errors import OneVisionError
from ..export.checkpoint import Checkpoint
from ..export.draft import Draft
from ..precision import BF16
from ..precision.plan import Plan, default_plan
from ..runtime.backend import SessionOptions
from ..runtime.model import Model
from .data import Data, DataOptions, Source
from .dataset import Dataset
from .journal import Journal, journal
from .quality import measure
from .recipe import Methods
from .walk import REFERENCE, Walk


@dataclass(frozen=True)
class Job:
    """One quantisation: everything but the plan."""

    checkpoint: Checkpoint
    target: Path
    methods: Methods
    data: Data
    digests: dict[str, str]
    seed: int = 0
    max_length: int | None = None
    overwrite: bool = False
    threads: int | None = None
    phases: Phases = no_phases
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
    extra_record: Mapping[str, Any] = field(default_factory=dict)

    def key(self, plan: Plan) -> dict[str, Any]:
        """What makes two runs one and the same."""
        return {
            "version": __version__,
            "checkpoint": _identity(self.checkpoint),
            "plan": plan.to_dict(),
            "methods": self.methods.to_dict(),
            "data": self.digests,
            "seed": self.seed,
        }

    def run(self, plan: Plan) -> Bundle:
        """Quantise by a plan. Raises OneVisionError."""
        draft = Draft.make(self.checkpoint, plan, self.max_length)
        with journal(self.target, self.key(plan)) as book:
            with self.phases("calibrate", "B") as progress:
                walk = self.walk(Walk, plan, book, self.data, progress)
                _check_lengths(walk, draft.max_length)
                walk.run()
            with writing(self.target, self.overwrite, draft.nbytes) as writer:
                with self.phases("write", "B") as progress:
                    manifest = draft.write(writer, progress, book.values())
                self._write_extra(writer)
                self._finish(writer, replace(manifest, quantization=self._record(plan, book)), walk, book)
        return Bundle.open(self.target)

    def walk(self, kind: type[Walk], plan: Plan, book: Journal, data: Data, progress: Progress) -> Any:
        """A walk through the model over the data."""
        return kind(
            self.checkpoint, plan, self.methods, data.roles(), book, progress, seed=self.seed, threads=self.threads
        )

    def _write_extra(self, writer: BundleWriter) -> None:
        for name, content in self.extra_files.items():
            writer.path(name).write_bytes(content)
            writer.seal(name)

    def _finish(self, writer: BundleWriter, manifest: Manifest, walk: Walk, book: Journal) -> None:
        """Write the manifest, with the quality in it where that is to be measured: with it this is a bundle."""
        if self.data.evaluation is not None:
            model = Model(Bundle(writer.directory, manifest), SessionOptions(threads=self.threads), image_cache=0)
            manifest = replace(manifest, quality=self._quality(model, self.data.evaluation, walk, book))
        writer.write_manifest(manifest)

    def _quality(self, model: Model, evaluation: Dataset, walk: Walk, book: Journal) -> dict[str, Any]:
        scored = [prompt.scored for prompt in walk.itinerary.prompts if not prompt.calibrating]
        reference = np.load(book.path(REFERENCE), mmap_mode="r")
        with self.phases("evaluate", "rows") as progress:
            quality = measure(model, evaluation, scored, reference, progress)
        return {**quality.to_dict(), "data": evaluation.source, "engine": f"onnxruntime {ort.__version__} CPU"}

    def _record(self, plan: Plan, book: Journal) -> dict[str, Any]:
        """What the manifest says of how the bundle was made."""
        return {
            "plan": plan.to_dict(),
            "methods": self.methods.to_dict(),
            "seed": self.seed,
            **self.data.describe(self.digests),
            "evaluated": self.data.evaluation is not None,
            **self.extra_record,
            "modules": dict(book.notes),
        }


def quantize(
    source: Source,
    output: Source,
    *,
    precision: str = "int8",
    plan: Plan | None = None,
    methods: Methods | None = None,
    calibration: Source | None = None,
    calibration_samples: int | None = None,
    evaluation: Source | None = None,
    evaluation_samples: int | None = None,
    evaluate: bool = True,
    max_length: int | None = None,
    max_pixels: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    threads: int | None = None,
    phases: Phases = no_phases,
) -> Bundle:
    """Quantise a checkpoint to a bundle.

    source: a checkpoint as `export` takes it. precision: int8, int8-weight, int4, fp8 or nvfp4, the decoder's, with
    defaults for the rest (precision.plan.default_plan); plan: one of your own instead. calibration, evaluation:
    data as calibration.dataset.load_dataset takes it. Without calibration, the shipped sets are used; with, a
    quarter of it is held out for evaluation unless that is given. Where it was interrupted, the same call goes on
    from the last finished layer and ends with the same bytes. max_pixels: of images in calibration and evaluation.
    Raises OneVisionError. (A search under a budget is calibration.auto.search_and_quantize.)
    """
    plan = plan or default_plan(precision)
    options = DataOptions(calibration, calibration_samples, evaluation, evaluation_samples, evaluate, max_pixels, seed)
    return prepare(source, output, methods or Methods(), options, plan, max_length, overwrite, threads, phases).run(
        plan
    )


def prepare(
    source: Source,
    output: Source,
    methods: Methods,
    options: DataOptions,
    plan: Plan,
    max_length: int | None,
    overwrite: bool,
    threads: int | None,
    phases: Phases,
) -> Job:
    """Check everything that can be checked before the first long step; every row of the data is read once."""
    target = Path(os.path.abspath(output))
    check_destination(target, overwrite)
    checkpoint = Checkpoint.open(source)
    Draft.make(checkpoint, plan, max_length)
    if options.evaluate and plan.dtype == BF16.name:
        raise OneVisionError(
            "a bf16 bundle cannot be measured here, ONNX Runtime's CPU provider has no bfloat16 kernels: quantise it "
            "without (--no-evaluate, evaluate=False), or in fp16"
        )
    data = Data.open(checkpoint, options)
    with phases("read data", "rows") as progress:
        digests = data.digests(progress)
    return Job(checkpoint, target, methods, data, digests, options.seed, max_length, overwrite, threads, phases)


def _check_lengths(walk: Walk, max_length: int) -> None:
    """Refuse rows that the bundle will not hold when it is measured on them."""
    longest = max((p for p in walk.itinerary.prompts if not p.calibrating), key=lambda p: len(p.ids), default=None)
    if longest is not None and len(longest.ids) > max_length:
        raise OneVisionError(
            f"{longest.scored.name}, for evaluation, has {len(longest.ids)} tokens; the bundle will hold {max_length}: "
            "give a larger --max-length, smaller images (--max-pixels) or other rows"
        )


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells whether it is still the same checkpoint, without reading it."""
    files = {tensor.path for tensor in checkpoint.tensors.values()}
    stats = {path.name: path.stat() for path in files}
    return {"config": checkpoint.config.to_dict(), "files": {n: [s.st_size, s.st_mtime_ns] for n, s in stats.items()}}
