"""The product with the vocabulary: by far the largest matrix, so it is read once and never held whole in float32."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..export.checkpoint import Checkpoint
from ..export.layers import ACTIVATION_CODES
from ..precision import float_format
from ..precision.codes import INT8, floats
from ..precision.formats import FORMATS, choose_scale, quantize_with
from ..precision.plan import Plan
from ..precision.scales import symmetric
from . import awq, smoothquant
from .migration import Product, fake_quantize, search
from .recipe import Methods
from .solve import clip_of, spread, stored
from .statistics import Statistics

PATH, NORM = "lm_head", "model.norm.weight"
_SLAB = 8192  # tokens of the vocabulary at a time
_COLUMNS = 2048  # of them in searches


class Head:
    """The last normalisation and the head of a checkpoint, under a plan."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, methods: Methods, seed: int) -> None:
        self.checkpoint, self.methods, self.fmt = checkpoint, methods, float_format(plan.dtype)
        text = checkpoint.config.text
        self.precision = plan.precision("decoder", PATH, text.hidden_size)
        self.seed, self.eps, self.width = seed, text.rms_norm_eps, text.hidden_size
        self.norm = floats(checkpoint.read(NORM))
        self.seen: Statistics | None = None

    def normalized(self, rows: np.ndarray) -> np.ndarray:
        """RMSNorm of rows [n, D], in float32."""
        mean = np.square(rows, dtype=np.float64).mean(axis=-1, keepdims=True)
        return (rows / np.sqrt(mean + self.eps)).astype(np.float32) * self.norm

    def watch(self, pieces: Sequence[np.ndarray]) -> None:
        """Look at what the head reads in calibration: the last layer's output, [tokens, D] each."""
        self.seen = Statistics(self.width, sum(map(len, pieces)), self.methods.samples, self.seed)
        for rows in pieces:
            self.seen.update(self.normalized(rows), PATH)

    def solve(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Values of the head's parameters, and of the normalisation's where it takes a scale up; notes."""
        if self.seen is None:
            return {}, {}
        matrix = self.checkpoint.read(self.checkpoint.head_name).T  # [D, vocab] in the checkpoint's format, a view
        strength, scale = self._migrate(matrix)
        values: dict[str, np.ndarray] = {}
        if strength is not None:
            values[NORM] = self.norm / scale
            matrix = floats(matrix) * scale[:, None]
        sample, largest = self.seen.sample / scale, 0.0
        if self.precision.activation:
            extremes = float((self.seen.absmax / scale).max())
            largest = clip_of(sample, extremes, self.precision.activation, self.methods, strength is not None)
            codes = ACTIVATION_CODES[self.precision.activation]
            values[f"{PATH}.input_scale"] = symmetric(largest, codes, self.fmt).astype(np.float32)
        note: dict[str, Any] = {"precision": self.precision.name}
        if self.precision.format is not None:
            values |= self._codes(matrix, scale)
        if strength is not None:
            note["strength"] = strength
        note["snr_db"] = self._snr(matrix, sample, largest)
        return values, {PATH: note}

    def _migrate(self, matrix: np.ndarray) -> tuple[float | None, np.ndarray]:
        assert self.seen is not None
        rounds, blocked = self.precision.activation == INT8.name, self.precision.block > 0
        if not (self.methods.smoothquant if rounds else self.methods.awq and blocked):
            return None, np.ones(self.width, np.float32)
        columns = floats(matrix[:, spread(matrix.shape[1], _COLUMNS)])
        if rounds:
            found, gain = smoothquant.candidates(self.seen.absmax, np.abs(columns).max(axis=1)), smoothquant.GAIN
        else:
            found, gain = awq.candidates(self.seen.mean_magnitude()), awq.GAIN
        sample = self.seen.sample[spread(len(self.seen.sample), 512)]
        return search(sample, self.seen.absmax, [Product(self.precision, columns)], found, gain)

    def _codes(self, matrix: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
        assert self.seen is not None
        form = FORMATS[str(self.precision.format)]
        importance = self.seen.mean_square() / np.square(scale) if self.methods.clip else None
        chosen = choose_scale(matrix, form, self.fmt, search_scales=self.methods.clip, importance=importance, name=PATH)
        return stored(PATH, quantize_with(matrix, form, chosen, PATH))

    def _snr(self, matrix: np.ndarray, sample: np.ndarray, largest: float) -> float:
        """Signal to noise of some logits, in decibels."""
        columns = floats(matrix[:, spread(matrix.shape[1], _COLUMNS)])
        exact, rounded, worth = sample @ columns, sample, columns
        if self.precision.activation:
            rounded = fake_quantize(sample, largest, ACTIVATION_CODES[self.precision.activation])
        if self.precision.format is not None:
            form = FORMATS[self.precision.format]
            worth = quantize_with(columns, form, choose_scale(columns, form, self.fmt)).dequantize().astype(np.float32)
        noise = np.square(rounded @ worth - exact, dtype=np.float64).sum()
        return round(10 * float(np.log10(np.square(exact, dtype=np.float64).sum() / max(noise, 1e-30))), 2)

    def write_logits(self, rows: np.ndarray, path: Path) -> None:
        """The full-precision logits of rows [n, D] of the last layer's output: float32 [n, vocab] in a file."""
        x, vocab = self.normalized(rows), self.checkpoint.config.text.vocab_size
        logits = np.lib.format.open_memmap(path, "w+", np.float32, (len(x), vocab))
        start = 0
        for slab in self.checkpoint.read_rows(self.checkpoint.head_name, _SLAB):
            logits[:, start : start + len(slab)] = x @ floats(slab).T
            start += len(slab)
        logits.flush()
