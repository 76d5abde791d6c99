"""How far a bundle is from full precision: next-token distributions and answers on rows that did not calibrate it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..bundle import Progress, no_progress
from ..config import ModelConfig
from ..runtime.token_model import TokenModel
from .dataset import Dataset
from .rows import Row
from .scored import Scored


@dataclass(frozen=True, slots=True)
class Quality:
    """The distance, over all scored positions and rows.

    kld: mean Kullback-Leibler divergence of the next-token distribution from full precision's, in nats; kld_p99:
    its 99th percentile. top1_agreement: share of positions with the same likeliest token. accuracy: share of rows
    whose expected answer greedy decoding gives exactly, and the same of full precision; None without answers.
    """

    kld: float
    kld_p99: float
    top1_agreement: float
    accuracy: float | None
    accuracy_reference: float | None
    samples: int
    positions: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)


class Tally:
    """Counts rows as they come: logits of full precision and of what is measured, at the same positions."""

    def __init__(self, config: ModelConfig) -> None:
        self._media = [config.image_token_id, config.video_token_id]  # never generated
        self._divergences: list[np.ndarray] = []
        self._agreed = self._answered = self._right = self._right_reference = self._rows = 0

    def add(self, reference: np.ndarray, measured: np.ndarray, targets: np.ndarray | None) -> None:
        """One row: logits float32 [n, vocab] each, and the ids expected after them, [n]."""
        self._divergences.append(divergence(reference, measured))
        likeliest, wanted = self._likeliest(measured), self._likeliest(reference)
        self._agreed += int((likeliest == wanted).sum())
        self._rows += 1
        if targets is not None:
            self._answered += 1
            self._right += bool((likeliest == targets).all())
            self._right_reference += bool((wanted == targets).all())

    def quality(self) -> Quality:
        """Everything so far."""
        divergences = np.concatenate(self._divergences)
        answered = self._answered
        return Quality(
            kld=float(divergences.mean()),
            kld_p99=float(np.quantile(divergences, 0.99)),
            top1_agreement=self._agreed / len(divergences),
            accuracy=self._right / answered if answered else None,
            accuracy_reference=self._right_reference / answered if answered else None,
            samples=self._rows,
            positions=len(divergences),
        )

    def _likeliest(self, logits: np.ndarray) -> np.ndarray:
        masked = logits.copy()
        masked[:, self._media] = -math.inf
        return masked.argmax(axis=1)


def divergence(reference: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """KL divergence in nats of softmax(measured) from softmax(reference), both [n, vocab]: float64 [n]."""
    wanted, found = log_softmax(reference), log_softmax(measured)
    return np.maximum((np.exp(wanted) * (wanted - found)).sum(axis=1), 0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits [n, vocab], in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def logits_of(model: TokenModel, row: Row, scored: Scored) -> np.ndarray:
    """A bundle's logits at the scored positions of a row: float32 [n, vocab]."""
    return model.logits_at(
        scored.positions,
        row.input_ids,
        row.pixel_values,
        row.image_grid_thw,
        row.pixel_values_videos,
        row.video_grid_thw,
    )


def measure(
    model: TokenModel,
    dataset: Dataset,
    scored: Sequence[Scored],
    reference: np.ndarray,
    progress: Progress = no_progress,
) -> Quality:
    """The quality of a loaded bundle. reference: logits of all scored positions in order, [positions, vocab]."""
    tally, start = Tally(model.config), 0
    for done, (row, places) in enumerate(zip(dataset, scored, strict=True), 1):
        stop = start + len(places.positions)
        tally.add(np.asarray(reference[start:stop]), logits_of(model, row, places), places.targets)
        progress(done, len(scored), row.name)
        start = stop
    return tally.quality()
