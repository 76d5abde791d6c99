"""Checkpoint in, quantised bundle out: calibrated on images, its distance from full precision measured."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from .. import __version__
from ..bundle import Bundle, BundleWriter, Manifest, Progress, check_destination, no_progress, writing
from ..config import ModelConfig
from ..export.checkpoint import Checkpoint
from ..export.draft import Draft
from ..precision.plan import Plan, default_plan
from ..runtime.model import load
from .dataset import SHIPPED_EVALUATION, Dataset, Preparer, hold_out, load_dataset, require_images
from .journal import Journal, journal
from .quality import measure
from .recipe import Methods
from .walk import REFERENCE, Walk

Source = str | os.PathLike[str]
# A title and what is counted (B for bytes) to a callback for what is done under it.
Phases = Callable[[str, str], AbstractContextManager[Progress]]

# Pixels of an image in calibration, where no limit is given: 512 tokens. Attention over more takes memory with the
# square of them, and ranges of activations do not grow with the image.
CALIBRATION_PIXELS = 512 * 28 * 28
_LARGE = 500_000_000  # parameters, from which on fewer rows are taken unless told otherwise


def no_phases(title: str, unit: str) -> AbstractContextManager[Progress]:
    """The phases of callers who want no progress."""
    return nullcontext(no_progress)


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
    Raises OneVisionError.
    """
    plan, methods = plan or default_plan(precision), methods or Methods()
    target = Path(os.path.abspath(output))
    check_destination(target, overwrite)
    checkpoint = Checkpoint.open(source)
    draft = Draft.make(checkpoint, plan, max_length)
    data = _Data.open(
        checkpoint, calibration, calibration_samples, evaluation, evaluation_samples, evaluate, max_pixels, seed
    )
    with phases("read data", "rows") as progress:
        digests = data.digests(progress)
    key = {
        "version": __version__,
        "checkpoint": _identity(checkpoint),
        "plan": plan.to_dict(),
        "methods": methods.to_dict(),
        "data": digests,
        "seed": seed,
    }
    with journal(target, key) as book:
        with phases("calibrate", "B") as progress:
            walk = Walk(checkpoint, plan, methods, data.roles(), book, progress, seed=seed, threads=threads)
            walk.run()
        with writing(output, overwrite, draft.nbytes) as writer:
            with phases("write", "B") as progress:
                manifest = draft.write(writer, progress, book.values())
            record = _record(plan, methods, data, digests, book, seed)
            _finish(writer, replace(manifest, quantization=record), walk, data, book, threads, phases)
    return Bundle.open(output)


def _finish(
    writer: BundleWriter,
    manifest: Manifest,
    walk: Walk,
    data: "_Data",
    book: Journal,
    threads: int | None,
    phases: Phases,
) -> None:
    """Write the manifest, with the quality in it where that is to be measured."""
    writer.write_manifest(manifest)
    if data.evaluation is None:
        return
    model = load(writer.directory, threads=threads)
    scored = [prompt.scored for prompt in walk.itinerary.prompts if not prompt.calibrating]
    reference = np.load(book.path(REFERENCE), mmap_mode="r")
    with phases("evaluate", "rows") as progress:
        quality = measure(model, data.evaluation, scored, reference, progress)
    found = {**quality.to_dict(), "data": data.evaluation.source, "engine": f"onnxruntime {ort.__version__} CPU"}
    writer.write_manifest(replace(manifest, quality=found))


class _Data:
    """Rows to calibrate on and rows to evaluate on, or None."""

    def __init__(self, calibration: Dataset, evaluation: Dataset | None) -> None:
        self.calibration, self.evaluation = calibration, evaluation

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        calibration: Source | None,
        calibration_samples: int | None,
        evaluation: Source | None,
        evaluation_samples: int | None,
        evaluate: bool,
        max_pixels: int | None,
        seed: int,
    ) -> "_Data":
        """Open both, checked so far as that needs no image read."""
        preparer = _preparer(checkpoint, max_pixels)
        rows, held = load_dataset(calibration, preparer), None
        require_images(rows)
        if evaluate and evaluation is not None:
            held = load_dataset(evaluation, preparer)
        elif evaluate and calibration is None:
            held = load_dataset(SHIPPED_EVALUATION, preparer)
        elif evaluate:
            rows, held = hold_out(rows, seed=seed)
        few = _parameters(checkpoint.config, checkpoint) >= _LARGE
        rows = rows.sample(calibration_samples or (32 if few else 256), seed)
        require_images(rows)
        return cls(rows, held and held.sample(evaluation_samples or (24 if few else 512), seed))

    def roles(self) -> Sequence[tuple[Dataset, bool]]:
        """Each with whether it calibrates."""
        return [(self.calibration, True), *([(self.evaluation, False)] if self.evaluation else [])]

    def digests(self, progress: Progress) -> dict[str, str]:
        """sha256 of each, as prepared."""
        named = {"calibration": self.calibration, "evaluation": self.evaluation}
        return {name: dataset.digest(progress) for name, dataset in named.items() if dataset is not None}


def _preparer(checkpoint: Checkpoint, max_pixels: int | None) -> Preparer:
    preparer = Preparer.from_directory(checkpoint.directory, checkpoint.config, max_pixels=max_pixels)
    if max_pixels is None and preparer.processor.max_pixels > CALIBRATION_PIXELS:
        return Preparer.from_directory(checkpoint.directory, checkpoint.config, max_pixels=CALIBRATION_PIXELS)
    return preparer


def _parameters(config: ModelConfig, checkpoint: Checkpoint) -> int:
    return sum(int(np.prod(tensor.shape)) for tensor in checkpoint.tensors.values())


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells whether it is still the same checkpoint, without reading it."""
    files = {tensor.path for tensor in checkpoint.tensors.values()}
    stats = {path.name: path.stat() for path in files}
    return {"config": checkpoint.config.to_dict(), "files": {n: [s.st_size, s.st_mtime_ns] for n, s in stats.items()}}


def _record(
    plan: Plan, methods: Methods, data: _Data, digests: dict[str, str], book: Journal, seed: int
) -> dict[str, Any]:
    """What the manifest says of how the bundle was made."""
    described = {
        name: {"source": dataset.source, "rows": len(dataset), "sha256": digests[name]}
        for name, dataset in (("calibration", data.calibration), ("evaluation", data.evaluation))
        if dataset is not None
    }
    return {
        "plan": plan.to_dict(),
        "methods": methods.to_dict(),
        "seed": seed,
        **described,
        "evaluated": data.evaluation is not None,
        "modules": dict(book.notes),
    }
