"""What a quantisation is calibrated on and what it is measured on, chosen so that the two share no image."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..bundle import Progress
from ..export.checkpoint import Checkpoint
from .dataset import SHIPPED_EVALUATION, Dataset, Preparer, hold_out, load_dataset, require_images

Source = str | os.PathLike[str]

# Pixels of an image in calibration, where no limit is given: 512 tokens. Attention over more takes memory with the
# square of them, and ranges of activations do not grow with the image.
CALIBRATION_PIXELS = 512 * 28 * 28
LARGE = 500_000_000  # parameters, from which on fewer rows are taken unless told otherwise
_ROWS = {False: (256, 512), True: (32, 24)}  # to calibrate and to evaluate on, of a small and of a large model


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Where rows come from, and how many; see `quantize`."""

    calibration: Source | None = None
    calibration_samples: int | None = None
    evaluation: Source | None = None
    evaluation_samples: int | None = None
    evaluate: bool = True
    max_pixels: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Data:
    """Rows to calibrate on, and rows to measure on, or None."""

    calibration: Dataset
    evaluation: Dataset | None

    @classmethod
    def open(cls, checkpoint: Checkpoint, options: DataOptions) -> "Data":
        """Open both, checked so far as that needs no image read. Raises OneVisionError."""
        preparer, seed = _preparer(checkpoint, options.max_pixels), options.seed
        rows, held = load_dataset(options.calibration, preparer), None
        require_images(rows)
        if options.evaluate and (options.evaluation is not None or options.calibration is None):
            held = load_dataset(options.evaluation or SHIPPED_EVALUATION, preparer)
        elif options.evaluate:
            rows, held = hold_out(rows, seed=seed)
        to_calibrate, to_evaluate = _ROWS[is_large(checkpoint)]
        if options.calibration_samples is not None:
            to_calibrate = options.calibration_samples
        if options.evaluation_samples is not None:
            to_evaluate = options.evaluation_samples
        rows = rows.sample(to_calibrate, seed)
        require_images(rows)
        return cls(rows, held and held.sample(to_evaluate, seed))

    def roles(self) -> Sequence[tuple[Dataset, bool]]:
        """Each with whether it calibrates."""
        return [(self.calibration, True), *([(self.evaluation, False)] if self.evaluation else [])]

    def digests(self, progress: Progress) -> dict[str, str]:
        """sha256 of each, as prepared."""
        return {name: dataset.digest(progress) for name, dataset in self._named()}

    def describe(self, digests: dict[str, str]) -> dict[str, Any]:
        """What the manifest says of them."""
        return {
            name: {"source": dataset.source, "rows": len(dataset), "sha256": digests[name]}
            for name, dataset in self._named()
        }

    def _named(self) -> list[tuple[str, Dataset]]:
        named = [("calibration", self.calibration), ("evaluation", self.evaluation)]
        return [(name, dataset) for name, dataset in named if dataset is not None]


def is_large(checkpoint: Checkpoint) -> bool:
    """Whether rows have to be counted."""
    return sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()) >= LARGE


def _preparer(checkpoint: Checkpoint, max_pixels: int | None) -> Preparer:
    preparer = Preparer.from_directory(checkpoint.directory, checkpoint.config, max_pixels=max_pixels)
    if max_pixels is None and preparer.processor.max_pixels > CALIBRATION_PIXELS:
        return Preparer.from_directory(checkpoint.directory, checkpoint.config, max_pixels=CALIBRATION_PIXELS)
    return preparer
