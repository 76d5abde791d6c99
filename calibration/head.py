"""The product with the vocabulary: by far the largest matrix, so it is read once and never held whole in float32."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..export.checkpoint import Checkpoint
from ..export.layers import ACTIVATION_CODES
from ..precision import float_format
from ..precision.codes import INT8, floats
from ..precision.formats import FORMATS, Quantized, choose_scale, quantize_with
from ..precision.plan import Plan
from ..precision.scales import symmetric
from .migration import Found, Product, fake_quantize, search
from .recipe import Methods
from .solve import clip_of, families, spread, stored
from .statistics import Statistics

PATH, NORM = "lm_head", "model.norm.weight"
_SLAB = 8192  # tokens of the vocabulary at a time
_COLUMNS = 2048  # of them in searches


class _Scaled:
    """A matrix [in, out] whose rows are multiplied by scale [in] where they are read, in float32: a tile at a time."""

    def __init__(self, matrix: np.ndarray, scale: np.ndarray) -> None:
        self.matrix, self.scale, self.shape = matrix, scale, matrix.shape

    def __getitem__(self, place: tuple[slice, slice | np.ndarray]) -> np.ndarray:
        return floats(self.matrix[place]) * self.scale[place[0], None]


class Head:
    """The last normalisation and the head of a checkpoint, under a plan."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, methods: Methods, seed: int) -> None:
        self.checkpoint, self.methods, self.fmt = checkpoint, methods, float_format(plan.dtype)
        text = checkpoint.config.text
        self.precision = plan.precision("decoder", PATH, text.hidden_size)
        self.seed, self.eps, self.width = seed, text.rms_norm_eps, text.hidden_size
        self.norm = floats(checkpoint.read(NORM))
        self.seen: Statistics | None = None
        self.quantized: Quantized | None = None
        self.scale, self.largest = np.ones(self.width, np.float32), 0.0

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
        matrix: Any = self.checkpoint.read(self.checkpoint.head_name).T  # [D, vocab] in its own format, a view
        strength, scale = self._migrate(matrix)
        values: dict[str, np.ndarray] = {}
        if strength is not None:
            values[NORM] = self.norm / scale
            matrix = _Scaled(matrix, scale)
        sample, self.scale = self.seen.sample / scale, scale
        if self.precision.activation:
            extremes = float((self.seen.absmax / scale).max())
            self.largest = clip_of(sample, extremes, self.precision.activation, self.methods, strength is not None)
            codes = ACTIVATION_CODES[self.precision.activation]
            values[f"{PATH}.input_scale"] = symmetric(self.largest, codes, self.fmt).astype(np.float32)
        note: dict[str, Any] = {"precision": self.precision.name}
        if self.precision.format is not None:
            self.quantized = self._codes(matrix, scale)
            values |= stored(PATH, self.quantized)
        if strength is not None:
            note["strength"] = strength
        note["snr_db"] = self._snr(matrix, sample)
        return values, {PATH: note}

    def _migrate(self, matrix: np.ndarray) -> Found:
        assert self.seen is not None
        rounds, blocked = self.precision.activation == INT8.name, self.precision.block > 0
        if not (self.methods.smoothquant if rounds else self.methods.awq and blocked):
            return None, np.ones(self.width, np.float32)
        columns = floats(matrix[:, spread(matrix.shape[1], _COLUMNS)])
        sample, products = self.seen.sample[spread(len(self.seen.sample), 512)], [Product(self.precision, columns)]
        found: Found = (None, np.ones(self.width, np.float32))
        for candidates, gain in families(self.seen, [columns], rounds):
            found = search(sample, self.seen.absmax, products, candidates, gain, found)
        return found

    def _codes(self, matrix: Any, scale: np.ndarray) -> Quantized:
        assert self.seen is not None
        form = FORMATS[str(self.precision.format)]
        importance = self.seen.mean_square() / np.square(scale) if self.methods.clip else None
        chosen = choose_scale(matrix, form, self.fmt, search_scales=self.methods.clip, importance=importance, name=PATH)
        return quantize_with(matrix, form, chosen, PATH)

    def _snr(self, matrix: Any, sample: np.ndarray) -> float:
        """Signal to noise of some logits, in decibels."""
        places = spread(matrix.shape[1], _COLUMNS)
        columns = floats(matrix[:, places])
        exact, rounded, worth = sample @ columns, sample, columns
        if self.precision.activation:
            rounded = fake_quantize(sample, self.largest, ACTIVATION_CODES[self.precision.activation])
        if self.quantized is not None:
            worth = self.quantized.columns(places).dequantize().astype(np.float32)
        noise = np.square(rounded @ worth - exact, dtype=np.float64).sum()
        return round(10 * float(np.log10(np.square(exact, dtype=np.float64).sum() / max(noise, 1e-30))), 2)

    def exact_logits(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Full-precision logits of rows [n, D] of the last layer's output, into float32 [n, vocab]."""
        x, start = self.normalized(rows), 0
        for slab in self.checkpoint.read_rows(self.checkpoint.head_name, _SLAB):
            out[:, start : start + len(slab)] = x @ floats(slab).T
            start += len(slab)
        return out

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """Logits of rows [n, D], float32 [n, vocab]: as solved, or in full precision where nothing was."""
        out = np.empty((len(rows), self.checkpoint.config.text.vocab_size), np.float32)
        if self.quantized is None:
            return self.exact_logits(rows, out)
        x = self.normalized(rows) / self.scale
        if self.precision.activation:
            x = fake_quantize(x, self.largest, ACTIVATION_CODES[self.precision.activation])
        for start in range(0, out.shape[1], _SLAB):
            part = slice(start, min(start + _SLAB, out.shape[1]))
            out[:, part] = x @ self.quantized.columns(part).dequantize().astype(np.float32)
        return out
