"""One stage solved: from its weights and what was seen of its activations to everything its graph stores.

For each activation (a tap) in turn: a scale on its channels, searched and taken up by what makes it (folds.py); the
scale of its codes; then each Linear that reads it: the scales of its weights, its codes, its bias.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..export.layers import ACTIVATION_CODES
from ..precision import FloatFormat
from ..precision.codes import INT8, pack
from ..precision.formats import FORMATS, Quantized, choose_scale, quantize_with
from ..precision.plan import FLOAT, Precision
from ..precision.scales import symmetric
from . import awq, smoothquant
from .bias_correction import corrected
from .clipping import clip_scales
from .folds import Fold
from .gptq import Factor, factor, gptq
from .migration import Found, Product, fake_quantize, search
from .observers import observer
from .recipe import Methods
from .stages import KEYS, VALUES
from .statistics import Statistics

_SEARCH_ROWS, _SEARCH_COLUMNS = 512, 512  # of an activation and of each matrix, in the search for a scale
# What codes reach, in parts of the largest magnitude that was seen. Smoothed, every channel comes near it, and among
# thousands of them some go beyond in the next image. FP8 is a float: twice the range costs it its smallest numbers.
HEADROOM = {"int8": 1.2, "fp8": 2.0}


@dataclass
class Group:
    """A stage of the model and what was seen of it; names are those of its graph."""

    weights: dict[str, np.ndarray]  # float32, Linears [in, out]
    precisions: Mapping[str, Precision]
    feeds: Mapping[str, Sequence[str]]  # tap: the Linears that read it
    folds: Mapping[str, Fold]
    statistics: Mapping[str, Statistics]
    named: Callable[[str], str] = str  # what messages call a name of the graph


@dataclass
class Solved:
    """values: of the parameters whose values are not the checkpoint's. notes: what was found, for the manifest.

    worth: where it is asked for, what the codes of each Linear's weights are worth, float32 [in, out].
    """

    values: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, dict[str, float | str]] = field(default_factory=dict)
    worth: dict[str, np.ndarray] | None = None


def solve(
    group: Group, methods: Methods, fmt: FloatFormat, int8_cache: bool = False, keep_worth: bool = False
) -> Solved:
    """Everything that is not the checkpoint's as it is. Replaces arrays in group.weights by folded ones."""
    solved, before = Solved(worth={} if keep_worth else None), dict(group.weights)
    migrated = {tap: _migrate(group, tap, methods) for tap in group.feeds if _wanted(group, tap)}
    for tap, (_, scale) in migrated.items():
        _fold(group, tap, scale)
    for tap, (strength, scale) in migrated.items():
        _Reader(group, tap, strength, scale, methods, fmt).solve(solved)
    if int8_cache:
        _solve_cache(group, migrated, methods, fmt, solved)
    for name, values in group.weights.items():
        if values is not before[name] and not _is_code(group, name):
            solved.values.setdefault(name, values)
    return solved


def wants_gram(precisions: Sequence[Precision], methods: Methods) -> bool:
    """Whether solving Linears of these precisions needs the Gram matrix of what they read."""
    return (methods.gptq or methods.clip) and any(_is_blocked(precision) for precision in precisions)


def _is_blocked(precision: Precision) -> bool:
    return precision.block > 0


def _is_code(group: Group, name: str) -> bool:
    path = name.removesuffix(".weight")
    return path != name and group.precisions.get(path, FLOAT).format is not None


def _wanted(group: Group, tap: str) -> bool:
    return any(group.precisions[path] is not FLOAT for path in group.feeds[tap])


def _migrate(group: Group, tap: str, methods: Methods) -> Found:
    """The scale on a tap's channels, float32 [in], and the strength it was found with."""
    seen, fold = group.statistics[tap], group.folds.get(tap)
    precisions = [group.precisions[path] for path in group.feeds[tap]]
    rounds = any(precision.activation == INT8.name for precision in precisions)
    ones = np.ones(seen.channels, np.float32)
    if fold is None or not (methods.smoothquant if rounds else methods.awq and any(map(_is_blocked, precisions))):
        return None, ones
    matrices = [group.weights[f"{path}.weight"] for path in group.feeds[tap]]
    products = [Product(p, _some_columns(matrix)) for p, matrix in zip(precisions, matrices, strict=True)]
    sample = seen.sample[spread(len(seen.sample), _SEARCH_ROWS)]
    found: Found = (None, ones)
    for candidates, gain in families(seen, matrices, rounds, fold.tied):
        tied = ((strength, scale[fold.ties]) for strength, scale in candidates)
        found = search(sample, seen.absmax, products, tied, gain, found)
    return found


def families(
    seen: Statistics,
    matrices: Sequence[np.ndarray],
    rounds: bool,
    tied: Callable[[np.ndarray], np.ndarray] = lambda channels: channels,
) -> Iterator[tuple[Iterator[tuple[float, np.ndarray]], float]]:
    """Candidates for a scale, (strength, scale), and the share of the error they must save, to be searched in turn.

    matrices: what reads the activation, float32 [in, out]. rounds: whether to INT8. tied: Fold.tied.
    """
    if rounds:
        rows = np.max([np.abs(matrix).max(axis=1) for matrix in matrices], axis=0)
        yield smoothquant.candidates(tied(seen.absmax), tied(rows)), smoothquant.GAIN
    else:
        magnitude = tied(seen.mean_magnitude())
        yield awq.candidates(magnitude), awq.GAIN
        rows = np.mean([np.abs(matrix).mean(axis=1) for matrix in matrices], axis=0)
        yield awq.balanced(magnitude, tied(rows)), awq.BALANCE_GAIN


def spread(count: int, most: int) -> np.ndarray:
    """At most so many of `count` indices, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def _some_columns(matrix: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix[:, spread(matrix.shape[1], _SEARCH_COLUMNS)])


def _fold(group: Group, tap: str, scale: np.ndarray) -> None:
    """Take the scale into what makes the activation and into the matrices that read it."""
    if (scale == 1).all():
        return
    fold = group.folds[tap]
    outputs = np.ones(fold.outputs, np.float32)
    outputs[fold.ties] = scale
    fold.apply(outputs, group.weights)
    for path in group.feeds[tap]:
        group.weights[f"{path}.weight"] = group.weights[f"{path}.weight"] * scale[:, None]


class _Reader:
    """The Linears that read one tap, whose channels have been divided by `scale`."""

    def __init__(
        self,
        group: Group,
        tap: str,
        strength: float | None,
        scale: np.ndarray,
        methods: Methods,
        fmt: FloatFormat,
    ) -> None:
        self.group, self.tap, self.methods, self.fmt = group, tap, methods, fmt
        self.strength, self.smoothed = strength, strength is not None
        seen = group.statistics[tap]
        self.sample, self.absmax = seen.sample / scale, seen.absmax / scale
        self.importance = seen.mean_square() / np.square(scale)
        self.gram = None if seen.gram is None else seen.gram / (scale[:, None] * scale)
        self._factor: Factor | None = None
        self._largest: dict[str, float] = {}

    def solve(self, solved: Solved) -> None:
        """Codes, scales and biases of every Linear, into `solved`."""
        for path in self.group.feeds[self.tap]:
            precision = self.group.precisions[path]
            if precision is FLOAT:
                continue
            if precision.activation and precision.activation not in self._largest:
                largest = self.largest(precision.activation)
                scale = symmetric(largest, ACTIVATION_CODES[precision.activation], self.fmt)
                solved.values[f"{path}.input_scale"] = scale.astype(np.float32)
            self._solve_linear(path, precision, solved)

    def largest(self, codes: str) -> float:
        """The magnitude that the extremes of an activation's codes stand for."""
        if codes not in self._largest:
            extremes = float(self.absmax.max(initial=0))
            self._largest[codes] = clip_of(self.sample, extremes, codes, self.methods, self.smoothed)
        return self._largest[codes]

    def _solve_linear(self, path: str, precision: Precision, solved: Solved) -> None:
        weights = self.group.weights[f"{path}.weight"]
        note: dict[str, float | str] = {"precision": precision.name}
        worth = weights
        if precision.format is not None:
            quantized = self._codes(path, weights, precision)
            solved.values |= stored(path, quantized)
            worth = quantized.dequantize().astype(np.float32)
            if solved.worth is not None:
                solved.worth[f"{path}.weight"] = worth
        exact = self.sample @ weights
        error = self._rounded(precision) @ worth - exact
        if f"{path}.bias" in self.group.weights and self.methods.bias_correction:
            solved.values[f"{path}.bias"] = corrected(self.group.weights[f"{path}.bias"], error)
            error -= error.mean(axis=0)
        noise = float(np.square(error, dtype=np.float64).sum())
        signal = float(np.square(exact, dtype=np.float64).sum())
        note["snr_db"] = round(10 * float(np.log10(max(signal, 1e-30) / max(noise, 1e-30))), 2)
        if self.strength is not None:
            note["strength"] = self.strength
        solved.notes[path] = note

    def _rounded(self, precision: Precision) -> np.ndarray:
        if precision.activation is None:
            return self.sample
        return fake_quantize(self.sample, self.largest(precision.activation), ACTIVATION_CODES[precision.activation])

    def _codes(self, path: str, weights: np.ndarray, precision: Precision) -> Quantized:
        form, name = FORMATS[str(precision.format)], self.group.named(f"{path}.weight")
        if self.methods.clip and form.block and self.gram is not None:
            scale = clip_scales(weights, form, self.fmt, self._gram_blocks(form.block), name)
        else:
            importance = self.importance if self.methods.clip else None
            scale = choose_scale(
                weights, form, self.fmt, search_scales=self.methods.clip, importance=importance, name=name
            )
        if self.methods.gptq and form.block and self.gram is not None:
            if self._factor is None:
                self._factor = factor(self.gram, self.methods.damping)
            return gptq(weights, self._factor, scale, form)
        return quantize_with(weights, form, scale, name)

    def _gram_blocks(self, block: int) -> np.ndarray:
        assert self.gram is not None
        starts = range(0, len(self.gram), block)
        return np.stack([self.gram[i : i + block, i : i + block] for i in starts])


def clip_of(sample: np.ndarray, extremes: float, codes: str, methods: Methods, smoothed: bool) -> float:
    """What the extremes of codes stand for: by the observer over a sample, or the largest value seen and headroom."""
    kind = methods.observer
    if kind == "auto":
        kind = "absmax" if smoothed or codes != INT8.name else "mse"
    if kind == "absmax":
        return extremes * HEADROOM[codes]
    watch = observer(kind, ACTIVATION_CODES[codes], percentile=methods.percentile)
    watch.update(sample)
    return min(float(watch.largest()), extremes)


def stored(path: str, quantized: Quantized) -> dict[str, np.ndarray]:
    """A matrix as the graph's parameters: bytes where they are codes, float32 where they are the graph's floats."""
    scale = quantized.scale
    values = {f"{path}.weight": pack(quantized.codes), f"{path}.weight_scale": scale.stored.astype(np.float32)}
    if scale.tensor is not None:
        values[f"{path}.weight_scale"] = pack(scale.stored)
        values[f"{path}.weight_scale_2"] = scale.tensor.astype(np.float32)
    return values


def _solve_cache(
    group: Group,
    migrated: Mapping[str, tuple[float | None, np.ndarray]],
    methods: Methods,
    fmt: FloatFormat,
    solved: Solved,
) -> None:
    """Scales of an INT8 cache: of keys as they are, of values as far as they were divided on the way."""
    projection = next(path for path in group.precisions if path.endswith("v_proj"))
    attention, output = projection.removesuffix(".v_proj"), projection.replace("v_proj", "o_proj")
    for name, tap in (("k_scale", KEYS), ("v_scale", VALUES)):
        seen = group.statistics[tap]
        sample, absmax = seen.sample, seen.absmax
        if tap == VALUES and output in migrated:
            outputs = np.ones(group.folds[output].outputs, np.float32)
            outputs[group.folds[output].ties] = migrated[output][1]
            sample, absmax = sample / outputs, absmax / outputs
        largest = clip_of(sample, float(absmax.max(initial=0)), INT8.name, methods, smoothed=True)
        solved.values[f"{attention}.{name}"] = symmetric(largest, INT8, fmt).astype(np.float32)
